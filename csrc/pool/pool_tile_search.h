// Which tile of targets a block of a pooling makes on CUDA (pool_plan_cuda.h, path tile): the one
// that moves least among those that fit, and leave enough blocks.
//
// Traffic is counted in the sectors of the boxes that tiles read and write. The search tries the
// channels of a tile from all down to a sector, and for each cuts D, H and W where that adds least;
// then, if halos still add much, the same by strips (without them, channels-last maps under windows
// of 13 to 31 moved 1.3 to 10 times the least); and if they do even so, both with all the shared
// memory that the device gives a block.
#pragma once

#include <algorithm>
#include <limits>

#include "core/plan.h"
#include "pool/pool.h"
#include "pool/pool_axis.h"

namespace weft {

// What a plan depends on. The defaults are those of sm_90.
struct DeviceFacts {
  int64_t multiprocessors = 132;
  int64_t shared_bytes = 227 * 1024;  // that one block may have
};

enum class PoolStep : uint8_t {
  max_forward,
  max_forward_places,
  max_backward,
  max_pick,
  max_indices,
  avg_forward,
  avg_backward
};

constexpr bool is_inverse(PoolStep step) {
  return step == PoolStep::max_backward || step == PoolStep::avg_backward;
}

struct PoolTile {
  int64_t outer = 1;
  int64_t d = 1;
  int64_t h = 1;
  int64_t w = 1;
  int64_t c = 1;
  int64_t strip = 0;  // rows of targets that are made at a time; 0: all h at once

  constexpr int64_t elements() const { return outer * d * h * w * c; }
};

// Rows of a tile that are in shared memory at a time.
struct StripRows {
  int64_t loaded = 1;  // of sources, as they are
  int64_t kept = 1;  // of sources, reduced along W; of targets, where gradients of maxima are added
};

namespace pool_plan {

constexpr int64_t kSector = 32;
constexpr int64_t kPack = 16;
// Four blocks and more a multiprocessor, so that one loads while another computes.
constexpr int64_t kComfortableShared = 48 * 1024;
// What every architecture from sm_80 on offers, twice a multiprocessor on most.
constexpr int64_t kSharedAnywhere = 96 * 1024;
// A block that copies less than this is not worth its start.
constexpr int64_t kLeastBox = 4 * 1024;
// Blocks wanted for each multiprocessor, and the targets below which a block is not cut for that.
constexpr int64_t kBlocksEach = 4;
constexpr int64_t kManyTargets = 2048;
// Targets of a block that holds several planes, and of any block.
constexpr int64_t kMostShared = 8192;
constexpr int64_t kMostTargets = 1 << 19;
// Comfort and parallelism may cost this much of the least traffic, in percent. Above the second,
// anything that moves less is worth its while.
constexpr int64_t kWorth = 112;
constexpr int64_t kTooMuch = 125;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Bytes of a place inside a window's width, between the passes of a maximum.
constexpr int64_t column_bytes(const PoolProblem& p) {
  return p.window[2].size <= 256 ? 1 : p.place_bytes();
}

// A problem and a step as the search for a tile sees them.
struct Search {
  const PoolProblem& p;
  PoolStep step;
  PoolAxis axis[3];
  bool inverse;
  int64_t source[3];
  int64_t target[3];
  int64_t size;    // bytes of an element
  int64_t places;  // bytes of a place that is moved, or 0

  StripRows rows(const PoolTile& tile) const {
    if (tile.strip == 0) return {box(tile, 1), box(tile, 1)};
    const int64_t hull = largest_hull(axis[1], inverse, tile.strip);
    const int64_t stride = p.window[1].stride;
    const int64_t loaded =
        std::min(inverse ? ceil_div(tile.strip, stride) : tile.strip * stride, hull);
    // Gradients of maxima are added to the rows of targets that windows so far reach.
    if (step == PoolStep::max_backward)
      return {loaded, std::min(tile.strip + axis[1].span() - 1, tile.h)};
    return {loaded, hull};
  }

  // Gradients of maxima divide places by the window's width with a Divider, of 40 bits.
  bool goes_by_strips() const {
    return !axis[1].adaptive && (step != PoolStep::max_backward ||
                                 p.window_elements() < (int64_t{1} << 40) / p.window[2].size);
  }

  // Gradients of maxima: so many windows hold an input that by strips is better in any case.
  bool only_by_strips() const {
    constexpr int64_t kManyWindows = 16;
    if (step != PoolStep::max_backward || !goes_by_strips()) return false;
    int64_t windows = 1;
    for (const PoolAxis& a : axis) windows *= ceil_div(a.span(), a.stride);
    return windows > kManyWindows;
  }

  int64_t box(const PoolTile& tile, int a) const {
    const int64_t extent[3] = {tile.d, tile.h, tile.w};
    return largest_hull(axis[a], inverse, extent[a]);
  }

  // Bytes of the sectors of a box [planes, h, w, c] of a map with these extents.
  int64_t sectors(const PoolTile& t, int64_t d, int64_t h, int64_t w, const int64_t (&extent)[3],
                  int64_t bytes) const {
    const bool whole_channels = t.c == p.inner;
    const bool whole_rows = whole_channels && w == extent[2];
    const bool whole_planes = whole_rows && h == extent[1];
    const int64_t elements = t.outer * d * h * w * t.c;
    const int64_t runs = whole_planes     ? 1
                         : whole_rows     ? t.outer * d
                         : whole_channels ? t.outer * d * h
                                          : elements / t.c;
    const int64_t run = elements / runs * bytes;
    const int64_t grain = (whole_planes ? extent[0] * extent[1] * extent[2]
                           : whole_rows ? extent[1] * extent[2]
                                        : 1) *
                          p.inner * bytes;
    const bool aligned = run % kSector == 0 && grain % kSector == 0 &&
                         (whole_channels || p.inner * bytes % kSector == 0);
    return runs * (aligned ? run : run + kSector - bytes);
  }

  int64_t tiles(const PoolTile& t) const {
    return ceil_div(p.outer, t.outer) * ceil_div(target[0], t.d) * ceil_div(target[1], t.h) *
           ceil_div(target[2], t.w) * ceil_div(p.inner, t.c);
  }

  int64_t traffic(const PoolTile& t) const {
    const int64_t d = box(t, 0), h = box(t, 1), w = box(t, 2);
    int64_t bytes = sectors(t, d, h, w, source, size) + sectors(t, t.d, t.h, t.w, target, size);
    if (places != 0)
      bytes +=
          inverse ? sectors(t, d, h, w, source, places) : sectors(t, t.d, t.h, t.w, target, places);
    return tiles(t) * bytes;
  }

  // As the tile kernels take it: the box, what pass 1 leaves or sums of targets, tables.
  int64_t shared(const PoolTile& t) const {
    const int64_t d = box(t, 0), h = box(t, 1), w = box(t, 2);
    const StripRows h_rows = rows(t);
    const int64_t rows = t.outer * d * h_rows.loaded;
    // Rows are laid out as in memory up to alignment: a pack more a row, plane and box.
    const auto box_bytes = [&](int64_t bytes) {
      return round_up((rows * w * t.c) * bytes + (rows + t.outer * d + 1) * kPack, kPack);
    };
    const int64_t middle = t.outer * d * h_rows.kept * t.w * t.c;
    const int64_t accumulated = p.dtype == DType::f64 ? 8 : 4;
    constexpr int64_t kReach = sizeof(Reach);
    int64_t bytes = box_bytes(size) + kReach * (t.d + t.h + t.w);
    switch (step) {
      case PoolStep::max_forward:
        return bytes + round_up(middle * size, kPack);
      case PoolStep::max_forward_places:
        return bytes + round_up(middle * size, kPack) + round_up(middle * column_bytes(p), kPack);
      case PoolStep::max_backward:
        return bytes + box_bytes(places) + round_up(4 * d, kPack) + round_up(4 * h, kPack) +
               round_up(4 * w, kPack) +
               (t.strip == 0
                    ? 0
                    : round_up(t.outer * t.d * h_rows.kept * t.w * t.c * accumulated, kPack));
      default:
        return bytes + round_up(middle * accumulated, kPack) + round_up(4 * d, kPack) +
               round_up(4 * h, kPack) + round_up(4 * w, kPack);
    }
  }
};

constexpr int64_t kAxisLimit = int64_t{1} << 30;

// False where the 32-bit arithmetic of tiles would overflow, where windows leave gaps (a box would
// then read what no window needs), and where there is no output at all.
inline bool fits_axes(const PoolProblem& p) {
  for (int a = 0; a < 3; ++a) {
    const PoolWindow& w = p.window[a];
    if (p.out[a] == 0) return false;
    if (p.in[a] >= kAxisLimit || p.out[a] >= kAxisLimit) return false;
    if (w.adaptive()) {
      if ((p.in[a] + 1) * (p.out[a] + 1) >= kAxisLimit) return false;
      continue;
    }
    if (w.size >= kAxisLimit || w.stride >= kAxisLimit || w.span() >= kAxisLimit / 2) return false;
    if (p.in[a] + 2 * w.padding >= kAxisLimit / 2) return false;
    if (p.out[a] > 1 && w.stride > w.span()) return false;
  }
  return p.inner < kAxisLimit;
}

inline Search search_of(const PoolProblem& p, PoolStep step) {
  Search s{p,
           step,
           {axis_of(p, 0), axis_of(p, 1), axis_of(p, 2)},
           is_inverse(step),
           {},
           {},
           size_of(p.dtype),
           0};
  for (int a = 0; a < 3; ++a) {
    s.source[a] = s.inverse ? p.out[a] : p.in[a];
    s.target[a] = s.inverse ? p.in[a] : p.out[a];
  }
  if (step == PoolStep::max_forward_places || step == PoolStep::max_backward)
    s.places = p.place_bytes();
  return s;
}

// Cuts the tile's D, H (if `rows`) or W, where that adds least traffic; false if nothing is left to
// cut.
inline bool cut(const Search& s, bool rows, PoolTile& tile) {
  // Rows of contiguous maps are cut at packs.
  const int64_t pack = kPack / s.size;
  const int64_t grain[3] = {1, 1, s.p.inner == 1 && s.target[2] % pack == 0 ? pack : 1};
  PoolTile best = tile;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int a = 0; a < 3; ++a) {
    if (a == 1 && !rows) continue;
    PoolTile next = tile;
    int64_t& extent = a == 0 ? next.d : a == 1 ? next.h : next.w;
    const int64_t parts = ceil_div(s.target[a], extent);
    const int64_t shorter = round_up(ceil_div(s.target[a], parts + ceil_div(parts, 4)), grain[a]);
    // Quarters more of even parts; where rounding hides the first of them, half.
    const int64_t half = round_up(ceil_div(extent, 2), grain[a]);
    extent = shorter < extent ? shorter : half;
    if (next.elements() == tile.elements()) continue;
    const int64_t traffic = s.traffic(next);
    if (traffic >= least) continue;
    least = traffic;
    best = next;
  }
  if (best.elements() == tile.elements()) return false;
  tile = best;
  return true;
}

// The most rows of targets at a time that fit comfortably, or at all.
inline int64_t strip_of(const Search& s, int64_t most_shared, PoolTile tile) {
  constexpr int64_t kLongestStrip = 16;
  for (const int64_t limit : {kComfortableShared, most_shared})
    for (tile.strip = kLongestStrip; tile.strip > 1; tile.strip /= 2)
      if (s.shared(tile) <= limit) return tile.strip;
  return 1;
}

// Cuts a tile of given channels until it fits, and on while comfort and parallelism are worth the
// traffic that they add to `least`. False if it cannot fit.
inline bool fit(const Search& s, const DeviceFacts& facts, int64_t least, bool by_strips,
                PoolTile& tile) {
  for (;;) {
    if (by_strips) tile.strip = strip_of(s, facts.shared_bytes, tile);
    const int64_t shared = s.shared(tile);
    const bool must = shared > facts.shared_bytes || tile.elements() >= kMostTargets;
    const bool large = shared > kComfortableShared;
    const bool few =
        s.tiles(tile) < kBlocksEach * facts.multiprocessors && tile.elements() >= kManyTargets;
    if (!must && !large && !few) return true;
    PoolTile next = tile;
    const bool rows = !by_strips || !(must || large);  // shorter tiles by strips are no smaller
    if (!cut(s, rows, next)) return !must;
    if (!must && s.traffic(next) > least * kWorth / 100) return true;
    tile = next;
  }
}

// Improves `tile`, which moves `best` bytes, to the one that moves least, small ones first among
// equals.
inline void find_channels(const Search& s, const DeviceFacts& facts, bool by_strips, int64_t& best,
                          PoolTile& tile) {
  const PoolTile all{1, s.target[0], s.target[1], s.target[2], s.p.inner};
  const int64_t least = s.traffic(all);
  const int64_t pack = kPack / s.size;
  // Channels are cut at sectors, or at packs of places, and below that only for want of memory.
  const int64_t grain = s.p.inner % pack != 0                  ? 1
                        : s.places == 1 && s.p.inner % 16 == 0 ? 16
                                                               : kSector / s.size;
  for (int64_t channels = s.p.inner;;) {
    PoolTile next = all;
    next.c = channels;
    if (fit(s, facts, least, by_strips, next)) {
      const int64_t traffic = s.traffic(next);
      const bool comfortable = s.shared(next) <= kComfortableShared;
      const bool any = (comfortable && !by_strips) || best / kTooMuch * 100 > least;
      if (any ? traffic <= best : traffic < best / kWorth * 100) {
        best = traffic;
        tile = next;
      }
      if (comfortable && traffic <= least * kWorth / 100) break;
    }
    if (channels == 1) break;
    const int64_t half = ceil_div(channels, 2);
    channels = channels > grain ? round_up(half, grain) : half;
    if (channels > half && channels >= next.c) channels = half;
  }
}

// False if not even the smallest tile fits.
inline bool find_tile(const Search& s, const DeviceFacts& facts, PoolTile& tile) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t best = kNone;
  const int64_t least = s.traffic({1, s.target[0], s.target[1], s.target[2], s.p.inner});
  for (const int64_t limit : {std::min(kSharedAnywhere, facts.shared_bytes), facts.shared_bytes}) {
    const DeviceFacts limited{facts.multiprocessors, limit};
    if (!s.only_by_strips()) find_channels(s, limited, false, best, tile);
    if (s.goes_by_strips() && best > least * kWorth / 100)
      find_channels(s, limited, true, best, tile);
    if (best <= least * kTooMuch / 100) break;
  }
  if (best == kNone) return false;
  // Small planes share a block.
  const bool whole = tile.d == s.target[0] && tile.h == s.target[1] && tile.w == s.target[2] &&
                     tile.c == s.p.inner;
  const int64_t plane = s.source[0] * s.source[1] * s.source[2] * s.p.inner * s.size;
  while (whole) {
    PoolTile more = tile;
    more.outer *= 2;
    const bool enough = s.tiles(more) >= kBlocksEach * facts.multiprocessors;
    if (more.outer > s.p.outer || s.shared(more) > kComfortableShared / 2 ||
        more.elements() > kMostShared || (!enough && tile.outer * plane >= kLeastBox))
      break;
    tile = more;
  }
  return true;
}

}  // namespace pool_plan
}  // namespace weft
