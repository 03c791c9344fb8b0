// How a pooling runs on CUDA: a pure function of the problem and of the device's facts.
//
// Every pooling is a gather: a *target* element (an output forward, an input backward) reads a box
// of *source* elements (inputs forward, outputs backward). Three ways:
//
//   tile    a block makes a box of targets from the box of sources that it needs, which it copies
//           to shared memory once. The tile is the largest that fits comfortably, cut where cutting
//           adds least traffic: rows of planes for contiguous maps, channels for channels-last
//           ones. Where even so the halos of high windows add too much, the block goes down the
//           map in strips, and keeps of the sources' rows what the next strip reads again; or,
//           backward of a maximum, sums of the rows of targets that windows so far reach.
//   reduce  a block makes one output (contiguous) or a run of channels of one (channels-last):
//           windows that are long and hardly overlap, such as global pooling.
//   walk    a thread makes one target straight from memory: what is left, such as windows with gaps
//           between them or too long for shared memory, and the ops that read no box (pick,
//           indices).
#pragma once

#include "pool/pool_tile_search.h"

namespace weft {

struct PoolPlan {
  enum class Path : uint8_t { tile, reduce, walk };

  Path path = Path::walk;
  PoolTile tile;               // path tile: the targets of a block; reduce: c is a run of channels
  int64_t box[3] = {1, 1, 1};  // path tile: the largest source box of a tile, for one outer index
  StripRows rows;              // path tile: what is in shared memory at a time
  int64_t blocks = 0;
  int threads = 256;
  int64_t shared_bytes = 0;
  int64_t bytes = 0;
  int64_t least_bytes = 0;
  int64_t flops = 0;
};

namespace pool_plan {

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
  plan.rows = s.rows(plan.tile);
  plan.blocks = s.tiles(plan.tile);
  plan.shared_bytes = s.shared(plan.tile);
  plan.bytes = std::max(s.traffic(plan.tile), plan.least_bytes);
  const PoolTile& t = plan.tile;
  const int64_t rows = std::max(t.strip == 0 ? t.h : t.strip, plan.rows.loaded);
  const bool columns = step == PoolStep::max_backward && t.strip != 0;
  const int64_t work =
      columns ? t.outer * t.w * t.c : t.outer * std::max(t.d, plan.box[0]) * rows * t.w * t.c / 2;
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
      return !tile                  ? "max_pool_backward_walk"
             : plan.tile.strip == 0 ? "max_pool_backward_tile"
                                    : "max_pool_backward_columns";
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
