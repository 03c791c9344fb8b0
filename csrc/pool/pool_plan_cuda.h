// How a pooling runs on CUDA: a pure function of the problem and of the device's facts.
//
// Every pooling is a gather: a *target* element (an output forward, an input backward) reads a box
// of *source* elements (inputs forward, outputs backward). Three ways:
//
//   tile    a block makes a box of targets from the box of sources that it needs, which it copies
//   to
//           shared memory once. The tile is the largest that fits comfortably, cut where cutting
//           adds least traffic: rows of planes for contiguous maps, channels for channels-last
//           ones.
//   reduce  a block makes one output (contiguous) or a run of channels of one (channels-last):
//           windows that are long and hardly overlap, such as global pooling.
//   walk    a thread makes one target straight from memory: what is left, such as windows with gaps
//           between them or too long for shared memory, and the ops that read no box (pick,
//           indices).
#pragma once

#include <algorithm>
#include <limits>

#include "core/plan.h"
#include "pool/pool.h"
#include "pool/pool_axis.h"

namespace weft {

// What a plan depends on. The defaults are those of sm_90; 96 KiB of shared memory a block is what
// every architecture from sm_80 on offers.
struct DeviceFacts {
  int64_t multiprocessors = 132;
  int64_t shared_bytes = 96 * 1024;
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

// ---- the plan ----------------------------------------------------------------------------------

struct PoolTile {
  int64_t outer = 1;
  int64_t d = 1;
  int64_t h = 1;
  int64_t w = 1;
  int64_t c = 1;

  constexpr int64_t elements() const { return outer * d * h * w * c; }
};

struct PoolPlan {
  enum class Path : uint8_t { tile, reduce, walk };

  Path path = Path::walk;
  PoolTile tile;               // path tile: the targets of a block; reduce: c is a run of channels
  int64_t box[3] = {1, 1, 1};  // path tile: the largest source box of a tile, for one outer index
  int64_t blocks = 0;
  int threads = 256;
  int64_t shared_bytes = 0;
  int64_t bytes = 0;
  int64_t least_bytes = 0;
  int64_t flops = 0;
};

namespace pool_plan {

constexpr int64_t kSector = 32;
constexpr int64_t kPack = 16;
// Four blocks and more a multiprocessor, so that one loads while another computes.
constexpr int64_t kComfortableShared = 48 * 1024;
// A block that copies less than this is not worth its start.
constexpr int64_t kLeastBox = 4 * 1024;
// Blocks wanted for each multiprocessor, and the targets below which a block is not cut for that.
constexpr int64_t kBlocksEach = 4;
constexpr int64_t kManyTargets = 2048;
// Targets of a block that holds several planes, and of any block.
constexpr int64_t kMostShared = 8192;
constexpr int64_t kMostTargets = 1 << 19;
// Comfort and parallelism may cost this much of the least traffic, in percent.
constexpr int64_t kWorth = 112;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
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

  // As the tile kernels take it: the box, what pass 1 leaves, tables of reaches.
  int64_t shared(const PoolTile& t) const {
    const int64_t d = box(t, 0), h = box(t, 1), w = box(t, 2);
    const int64_t rows = t.outer * d * h;
    // Rows are laid out as in memory up to alignment: a pack more a row, plane and box.
    const auto box_bytes = [&](int64_t bytes) {
      return round_up((rows * w * t.c) * bytes + (rows + t.outer * d + 1) * kPack, kPack);
    };
    const int64_t middle = rows * t.w * t.c;
    const int64_t accumulated = p.dtype == DType::f64 ? 8 : 4;
    constexpr int64_t kReach = sizeof(Reach);
    int64_t bytes = box_bytes(size) + kReach * (t.d + t.h + t.w);
    switch (step) {
      case PoolStep::max_forward:
        return bytes + round_up(middle * size, kPack);
      case PoolStep::max_forward_places:
        return bytes + round_up(middle * size, kPack) + round_up(middle * places, kPack);
      case PoolStep::max_backward:
        return bytes + box_bytes(places) + round_up(4 * d, kPack) + round_up(4 * h, kPack) +
               round_up(4 * w, kPack);
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

// Cuts the tile's D, H or W, where that adds least traffic; false if nothing is left to cut.
inline bool cut(const Search& s, PoolTile& tile) {
  // Rows of contiguous maps are cut at packs.
  const int64_t pack = kPack / s.size;
  const int64_t grain[3] = {1, 1, s.p.inner == 1 && s.target[2] % pack == 0 ? pack : 1};
  PoolTile best = tile;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int a = 0; a < 3; ++a) {
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

// Cuts a tile of given channels until it fits, and on while comfort and parallelism are worth the
// traffic that they add to `least`. False if it cannot fit.
inline bool fit(const Search& s, const DeviceFacts& facts, int64_t least, PoolTile& tile) {
  for (;;) {
    const int64_t shared = s.shared(tile);
    const bool must = shared > facts.shared_bytes || tile.elements() >= kMostTargets;
    const bool large = shared > kComfortableShared;
    const bool few =
        s.tiles(tile) < kBlocksEach * facts.multiprocessors && tile.elements() >= kManyTargets;
    if (!must && !large && !few) return true;
    PoolTile next = tile;
    if (!cut(s, next)) return !must;
    if (!must && s.traffic(next) > least * kWorth / 100) return true;
    tile = next;
  }
}

// The tile that moves least, small ones first among equals; false if not even the smallest fits.
inline bool find_tile(const Search& s, const DeviceFacts& facts, PoolTile& tile) {
  const PoolTile all{1, s.target[0], s.target[1], s.target[2], s.p.inner};
  const int64_t least = s.traffic(all);
  const int64_t pack = kPack / s.size;
  // Channels are cut at sectors, or at packs of places, and below that only for want of memory.
  const int64_t grain = s.p.inner % pack != 0                  ? 1
                        : s.places == 1 && s.p.inner % 16 == 0 ? 16
                                                               : kSector / s.size;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int64_t channels = s.p.inner;;) {
    PoolTile next = all;
    next.c = channels;
    if (fit(s, facts, least, next)) {
      const int64_t traffic = s.traffic(next);
      const bool comfortable = s.shared(next) <= kComfortableShared;
      if (comfortable ? traffic <= best : traffic < best / kWorth * 100) {
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
  if (best == std::numeric_limits<int64_t>::max()) return false;
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

// Windows that are long and hardly overlap: a block an output leaves no thread without work.
inline bool suits_reduction(const PoolProblem& p, const Search& s) {
  if (s.inverse) return false;
  const int64_t read = p.out_positions() * p.window_elements();
  if (read > 2 * p.in_positions() + p.window_elements()) return false;
  if (p.inner > 1) return p.window_elements() >= 32 && p.inner * s.size >= kSector;
  return p.window_elements() >= 256 && (p.out[2] == 1 || p.window[2].size * s.size >= 16 * kSector);
}

constexpr int kReduceThreads = 256;
constexpr int64_t kReduceLanes = 8;  // of channel packs; 128 bytes of each position

}  // namespace pool_plan

inline PoolPlan plan_pool(const PoolProblem& p, PoolStep step, const DeviceFacts& facts = {}) {
  using namespace pool_plan;
  PoolPlan plan;
  const int64_t size = size_of(p.dtype);
  const bool forward_max = step == PoolStep::max_forward || step == PoolStep::max_forward_places;
  const int64_t places = step == PoolStep::max_forward || step == PoolStep::avg_forward ||
                                 step == PoolStep::avg_backward
                             ? 0
                             : p.out_elements() * p.place_bytes();
  switch (step) {
    case PoolStep::max_indices:
      plan.least_bytes = places + p.out_elements() * 8;
      break;
    case PoolStep::max_pick:  // a sector of input an output, or the whole input
      plan.least_bytes = places + p.out_elements() * size +
                         std::min(p.in_elements() * size, p.out_elements() * kSector);
      break;
    default:
      plan.least_bytes = places + (p.in_elements() + p.out_elements()) * size;
  }
  if (forward_max || step == PoolStep::avg_forward || step == PoolStep::avg_backward)
    plan.flops = p.out_elements() * p.window_elements();
  else if (step == PoolStep::max_backward)
    plan.flops = p.out_elements();
  plan.bytes = plan.least_bytes;

  const Search s = search_of(p, step);
  const int64_t targets = s.inverse ? p.in_elements() : p.out_elements();
  plan.blocks = ceil_div(targets, plan.threads);
  if (step == PoolStep::max_pick || step == PoolStep::max_indices) return plan;

  if (suits_reduction(p, s)) {
    plan.path = PoolPlan::Path::reduce;
    const int64_t pack = kPack / size;
    plan.tile = {1, 1, 1, 1, p.inner == 1 ? 1 : std::min(p.inner, kReduceLanes * pack)};
    plan.blocks = p.outer * p.out_positions() * ceil_div(p.inner, plan.tile.c);
    plan.threads = kReduceThreads;
    // Contiguous: a value and a place a warp. Channels-last: those of each thread's channels.
    const int64_t kept = forward_max ? 8 + 4 : 8;
    plan.shared_bytes =
        p.inner == 1 ? round_up(kReduceThreads / 32 * 8, kPack) * 2 : kReduceThreads * pack * kept;
    return plan;
  }
  if (!fits_axes(p) || !find_tile(s, facts, plan.tile)) return plan;
  plan.path = PoolPlan::Path::tile;
  for (int a = 0; a < 3; ++a) plan.box[a] = s.box(plan.tile, a);
  plan.blocks = s.tiles(plan.tile);
  plan.shared_bytes = s.shared(plan.tile);
  plan.bytes = std::max(s.traffic(plan.tile), plan.least_bytes);
  const int64_t work = std::max(plan.tile.elements(), plan.tile.outer * plan.box[0] * plan.box[1] *
                                                          plan.tile.w * plan.tile.c) /
                       2;
  plan.threads = static_cast<int>(std::clamp<int64_t>(
      round_up(work, 32), 32, plan.shared_bytes > kComfortableShared ? 512 : 256));
  return plan;
}

// ---- names -------------------------------------------------------------------------------------

constexpr const char* name_of(PoolStep step) {
  switch (step) {
    case PoolStep::max_forward:
    case PoolStep::max_forward_places:
      return "max_pool";
    case PoolStep::max_backward:
      return "max_pool_backward";
    case PoolStep::max_pick:
      return "max_pool_pick";
    case PoolStep::max_indices:
      return "max_pool_indices";
    case PoolStep::avg_forward:
      return "avg_pool";
    case PoolStep::avg_backward:
      return "avg_pool_backward";
  }
  return "";
}

constexpr const char* name_of(PoolPlan::Path path) {
  return path == PoolPlan::Path::tile ? "tile" : path == PoolPlan::Path::reduce ? "reduce" : "walk";
}

// The kernel that a plan launches, as launch reports name it.
inline std::string kernel_of(const PoolProblem& p, PoolStep step, const PoolPlan& plan) {
  const bool tile = plan.path == PoolPlan::Path::tile;
  switch (step) {
    case PoolStep::max_pick:
    case PoolStep::max_indices:
      return name_of(step);
    case PoolStep::max_backward:
      return tile ? "max_pool_backward_tile" : "max_pool_backward_walk";
    case PoolStep::avg_backward:
      return tile ? "avg_pool_tile" : "avg_pool_backward_walk";
    default:
      break;
  }
  const std::string suffix = plan.path != PoolPlan::Path::reduce ? name_of(plan.path)
                             : p.inner == 1                      ? "reduce_rows"
                                                                 : "reduce_channels";
  return std::string(name_of(step)) + "_" + suffix;
}

}  // namespace weft
