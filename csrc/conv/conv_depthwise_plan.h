// How a convolution of few channels a group runs on CUDA, a depthwise one first of all: its tiles.
//
// A *target* element (an output in fprop, an input in dgrad) gathers from a box of *source*
// elements. A block copies the box of a tile of targets to shared memory once, so that the map is
// read once but for the rows where tiles meet. The tile is cut where cutting adds least traffic,
// until its box fits comfortably; wgrad takes the tiles of fprop.
#pragma once

#include <algorithm>
#include <numeric>

#include "conv/conv_plan_cuda.h"

namespace weft {

// One axis of the gather: sources are read at `source_step` from the first on, by weights at
// `place_step`.
struct GatherAxis {
  Window window;
  int64_t source = 1;
  int64_t target = 1;
  bool inverse = false;  // dgrad: targets are inputs
  int source_step = 1;
  int place_step = 1;
};

// What one target reads of one axis: so many sources and weights, from these on.
struct Reach {
  int source, place, count;
};

// The sources that a run of targets reads lie in here.
struct Hull {
  int begin, size;
};

inline GatherAxis gather_axis(const ConvProblem& p, int a, bool inverse) {
  GatherAxis axis;
  axis.window = p.window[a];
  axis.source = inverse ? p.out[a] : p.in[a];
  axis.target = inverse ? p.in[a] : p.out[a];
  axis.inverse = inverse;
  int64_t common = axis.window.stride;  // the greatest divisor of stride and dilation
  for (int64_t rest = axis.window.dilation; rest != 0;) {
    const int64_t next = common % rest;
    common = rest;
    rest = next;
  }
  const int64_t place_step = inverse ? axis.window.stride / common : 1;
  axis.place_step = static_cast<int>(place_step);
  axis.source_step =
      static_cast<int>(inverse ? -(axis.window.dilation / common) : axis.window.dilation);
  return axis;
}

WEFT_HD Hull hull_of(const GatherAxis& axis, int64_t first, int64_t count) {
  const Window& w = axis.window;
  const int64_t span = w.dilation * (w.size - 1) + 1;
  int64_t begin, end;
  if (axis.inverse) {
    begin = outputs_covering(w, first, axis.source).begin;
    end = outputs_covering(w, first + count - 1, axis.source).end;
  } else {
    begin = w.first_input(first);
    end = w.first_input(first + count - 1) + span;
  }
  if (begin < 0) begin = 0;
  if (end > axis.source) end = axis.source;
  return {static_cast<int>(begin), end > begin ? static_cast<int>(end - begin) : 0};
}

WEFT_HD Reach reach_of(const GatherAxis& axis, int64_t target) {
  const Window& w = axis.window;
  if (!axis.inverse) {
    const Range places = places_inside(w, target, axis.source);
    const int64_t count = places.end > places.begin ? places.end - places.begin : 0;
    return {static_cast<int>(w.first_input(target) + places.begin * w.dilation),
            static_cast<int>(places.begin), static_cast<int>(count)};
  }
  // Outputs fall as places rise; the first place that meets an output, then the first inside.
  int64_t place = 0;
  while (place < axis.place_step && (target + w.padding - place * w.dilation) % w.stride != 0)
    ++place;
  const int64_t at = target + w.padding - place * w.dilation;
  if (place == axis.place_step || at < 0) return {0, 0, 0};
  const int64_t down = -axis.source_step;
  int64_t output = at / w.stride;
  const int64_t skipped = output < axis.source ? 0 : ceil_div(output - axis.source + 1, down);
  output -= skipped * down;
  place += skipped * axis.place_step;
  if (output < 0 || place >= w.size) return {0, 0, 0};
  const int64_t by_places = ceil_div(w.size - place, axis.place_step);
  const int64_t by_outputs = output / down + 1;
  return {static_cast<int>(output), static_cast<int>(place),
          static_cast<int>(by_places < by_outputs ? by_places : by_outputs)};
}

struct DepthwisePlan {
  bool tiled = false;
  int images = 1;
  int groups = 1;
  int extent[3] = {1, 1, 1};  // of a tile of targets
  int box[3] = {1, 1, 1};     // of the largest box of sources
  int64_t tiles = 0;          // along images and positions; groups apart
  int64_t chunks = 0;         // of groups
  int splits = 1;             // wgrad: the blocks among which the tiles of a chunk are divided
  int64_t bytes = 0;          // of shared memory, for box, tile of gradients and weights
};

namespace depthwise_plan {

constexpr int64_t kComfortable = 48 * 1024;
constexpr int64_t kMost = 96 * 1024;
// Traffic, in percent of the least, for which a tile may take more than is comfortable.
constexpr int64_t kWorth = 112;
constexpr int64_t kSector = 32;
constexpr int64_t kBlocksEach = 4;       // wanted for each multiprocessor
constexpr int64_t kLeastTargets = 1024;  // a tile below this is not cut for that
constexpr int kThreads = 256;

struct Search {
  const ConvProblem& p;
  bool weights;  // wgrad: gradients of the tile lie beside the box
  GatherAxis axis[3];
  int64_t source_each;  // channels of a group
  int64_t target_each;

  int64_t largest_box(int a, int64_t extent) const {
    int64_t most = 0;
    for (int64_t first = 0; first < axis[a].target; first += extent)
      most = std::max<int64_t>(
          most, hull_of(axis[a], first, std::min(extent, axis[a].target - first)).size);
    return most;
  }

  // Sources read along an axis by all tiles.
  int64_t read(int a, int64_t extent) const {
    int64_t sum = 0;
    for (int64_t first = 0; first < axis[a].target; first += extent)
      sum += hull_of(axis[a], first, std::min(extent, axis[a].target - first)).size;
    return sum;
  }
  int64_t read(const DepthwisePlan& plan) const {
    return read(0, plan.extent[0]) * read(1, plan.extent[1]) * read(2, plan.extent[2]);
  }
  int64_t targets() const { return axis[0].target * axis[1].target * axis[2].target; }
  int64_t sources() const { return axis[0].source * axis[1].source * axis[2].source; }

  // What moves where `bytes` do, in sectors that runs of channels or of a row share.
  int64_t in_sectors(const DepthwisePlan& plan, int64_t bytes, int64_t each) const {
    const int64_t size = size_of(p.dtype);
    const int64_t cut = p.channels_last ? plan.groups * each : plan.extent[2];
    const int64_t all = p.channels_last ? p.groups * each : axis[2].target;
    if (cut == all || (cut * size % kSector == 0 && all * size % kSector == 0)) return bytes;
    return bytes * (cut * size + kSector - size) / (cut * size);
  }

  // Percent of the least traffic of the maps: sources that tiles share, and weights that each of
  // them reads.
  int64_t percent(const DepthwisePlan& plan) const {
    const int64_t maps = p.n * (sources() * source_each + targets() * target_each);
    const int64_t factors = p.window_elements() * source_each * target_each;
    const int64_t moved = in_sectors(plan, p.n * read(plan) * source_each, source_each) +
                          in_sectors(plan, p.n * targets() * target_each, target_each) +
                          (plan.tiles - 1) * factors;  // once is the least
    return 100 * moved / maps;
  }

  // Elements of a box (or a tile of gradients) in shared memory, where rows are whole packs.
  int64_t padded_elements(const DepthwisePlan& plan, const int (&box)[3], int64_t each) const {
    const int64_t pack = 16 / size_of(p.dtype);
    const int64_t channels = plan.groups * each;
    const int64_t row = p.channels_last ? box[2] * channels : box[2];
    const int64_t rows =
        int64_t{1} * plan.images * box[0] * box[1] * (p.channels_last ? 1 : channels);
    return rows * ceil_div(row, pack) * pack;
  }
  int64_t target_elements(const DepthwisePlan& plan) const {
    return plan.images * plan.groups * target_each * plan.extent[0] * plan.extent[1] *
           plan.extent[2];
  }
  int64_t shared(const DepthwisePlan& plan) const {
    const int64_t acc = p.dtype == DType::f64 ? 8 : 4;
    const int64_t factors = plan.groups * source_each * target_each * p.window_elements();
    const int64_t sums =
        weights ? std::max<int64_t>(factors, kThreads * (8 / size_of(p.dtype))) : factors;
    const int64_t reaches = plan.extent[0] + plan.extent[1] + plan.extent[2];
    const int64_t elements = padded_elements(plan, plan.box, source_each) +
                             (weights ? padded_elements(plan, plan.extent, target_each) : 0);
    return elements * size_of(p.dtype) + ceil_div(sums * acc, 16) * 16 +
           ceil_div(reaches * static_cast<int64_t>(sizeof(Reach)), 16) * 16;
  }

  void complete(DepthwisePlan& plan) const {
    for (int a = 0; a < 3; ++a)
      plan.box[a] = static_cast<int>(std::max<int64_t>(largest_box(a, plan.extent[a]), 1));
    plan.tiles = ceil_div(p.n, plan.images);
    for (int a = 0; a < 3; ++a) plan.tiles *= ceil_div(axis[a].target, plan.extent[a]);
    plan.chunks = ceil_div(p.groups, plan.groups);
    plan.bytes = shared(plan);
  }

  // Halves the axis whose halving adds least traffic; false if there is none left.
  bool cut(DepthwisePlan& plan) const {
    DepthwisePlan best;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int a = 0; a < 3; ++a) {
      if (plan.extent[a] == 1) continue;
      DepthwisePlan next = plan;
      next.extent[a] = static_cast<int>(ceil_div(plan.extent[a], 2));
      complete(next);
      const int64_t traffic = percent(next);
      if (traffic >= least) continue;
      least = traffic;
      best = next;
    }
    if (least == std::numeric_limits<int64_t>::max()) return false;
    plan = best;
    return true;
  }
};

// Depthwise problems, and products of a step whose tiles (conv_plan_cuda.h) would be mostly empty.
constexpr bool suits(const ConvProblem& p, ConvProduct step) {
  constexpr int64_t kMostChannels = 16;
  if (p.c == 1 && p.k == 1) return true;
  return std::max(p.c, p.k) <= kMostChannels &&
         (step == ConvProduct::dgrad ? p.c : p.k) < conv_plan::kLeastChannels;
}

}  // namespace depthwise_plan

inline DepthwisePlan plan_depthwise(const ConvProblem& p, ConvProduct step,
                                    const ConvCudaFacts& facts = {}) {
  using namespace depthwise_plan;
  DepthwisePlan plan;
  if (!suits(p, step) || p.out_elements() == 0 || !conv_plan::fits(p)) return plan;
  const bool inverse = step == ConvProduct::dgrad;
  const Search s{
      p,
      step == ConvProduct::wgrad,
      {gather_axis(p, 0, inverse), gather_axis(p, 1, inverse), gather_axis(p, 2, inverse)},
      inverse ? p.k : p.c,
      inverse ? p.c : p.k};
  const int64_t size = size_of(p.dtype);
  // Groups whose channels are whole sectors, on both sides.
  const int64_t sector = kSector / size;
  const int64_t whole_groups =
      std::max(sector / std::gcd(sector, p.c), sector / std::gcd(sector, p.k));
  int64_t least = std::numeric_limits<int64_t>::max();
  for (const int64_t limit : {kComfortable, kMost}) {
    if (least <= kWorth) break;
    // Channels-last: two sectors of channels, one, or all of a position.
    for (const int64_t groups : {2 * whole_groups, whole_groups, p.groups}) {
      if (!p.channels_last && groups != p.groups) continue;
      DepthwisePlan next;
      next.groups = static_cast<int>(p.channels_last ? std::min(groups, p.groups) : 1);
      for (int a = 0; a < 3; ++a) next.extent[a] = static_cast<int>(s.axis[a].target);
      s.complete(next);
      while (next.bytes > limit && s.cut(next)) {
      }
      if (next.bytes > limit || s.percent(next) >= least) continue;
      least = s.percent(next);
      plan = next;
      plan.tiled = true;
    }
  }
  if (!plan.tiled || plan.tiles * plan.chunks > conv_plan::kInt) return {};

  // Small planes share a block: neighbouring groups, then images, which share their weights.
  const int64_t wanted = kBlocksEach * facts.multiprocessors;
  const bool whole = plan.tiles == p.n;
  const auto grow = [&](int DepthwisePlan::* count, int64_t most, int64_t limit, int64_t blocks) {
    while (whole && plan.*count < most) {
      DepthwisePlan next = plan;
      next.*count = static_cast<int>(std::min<int64_t>(2 * plan.*count, most));
      s.complete(next);
      const bool idle = s.target_elements(plan) < kLeastTargets;
      if (next.bytes > limit || (!idle && next.tiles * next.chunks < blocks)) return;
      plan = next;
    }
  };
  const bool heavy =
      p.window_elements() * s.source_each * 4 > s.targets();  // as many weights as elements
  if (heavy) grow(&DepthwisePlan::images, p.n, kMost, facts.multiprocessors);
  if (!p.channels_last) grow(&DepthwisePlan::groups, p.groups, kComfortable / 2, wanted);
  grow(&DepthwisePlan::images, p.n, kComfortable / 2, wanted);

  if (step == ConvProduct::wgrad) {
    // Partial sums are written and read again: at most a tenth of what the maps take.
    const int64_t maps = (p.in_elements() + p.out_elements()) * size;
    const int64_t partial = 2 * p.weight_elements() * (p.dtype == DType::f64 ? 8 : 4);
    const int64_t most = std::max<int64_t>(maps / 10 / std::max<int64_t>(partial, 1), 1);
    const int64_t splits =
        std::clamp<int64_t>(ceil_div(wanted, plan.chunks), 1, std::min(most, plan.tiles));
    plan.splits = static_cast<int>(ceil_div(plan.tiles, ceil_div(plan.tiles, splits)));
    return plan;
  }
  while (plan.tiles * plan.chunks < wanted && s.target_elements(plan) > 2 * kLeastTargets) {
    DepthwisePlan next = plan;
    if (next.images > 1) {
      next.images = static_cast<int>(ceil_div(next.images, 2));
      s.complete(next);
    } else if (!s.cut(next) || s.percent(next) > kWorth) {
      break;
    }
    plan = next;
  }
  return plan;
}

// What the partial sums of a split wgrad take, in bytes.
inline int64_t wgrad_workspace(const ConvProblem& p, const DepthwisePlan& plan) {
  if (!plan.tiled || plan.splits == 1) return 0;
  return plan.splits * p.weight_elements() * (p.dtype == DType::f64 ? 8 : 4);
}

}  // namespace weft
