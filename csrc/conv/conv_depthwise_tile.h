// What the depthwise CUDA kernels share: a block's tile, the copy of its box, its tables.
//
// A box lies in shared memory as [image][d][h][w][channel] for channels-last maps and as [image]
// [channel][d][h][w] for contiguous ones, rows padded to packs. Rows are copied asynchronously in
// the widest unit that all of them are aligned to; a group of lanes takes a row.
#pragma once

#include "conv/conv_depthwise_plan.h"
#include "conv/conv_operands.h"

namespace weft::WEFT_TARGET {

namespace {

// How the elements of a box or tile lie in shared memory, and how its rows are copied.
struct BoxSteps {
  int image, channel, d, h, w;
  int elements;
};

struct RowCopy {
  int unit = 1;   // elements copied at a time
  int lanes = 1;  // that take a row, a power of two
};

// Everything that is equal for all blocks of a launch.
struct DepthwiseWalk {
  GatherAxis axis[3];
  bool channels_last;
  int64_t images;
  int groups;
  int source_each, target_each;  // channels of a group
  int places;
  int place_step[3];  // in memory, from place to place of each axis
  MapSteps source, target;
  int tile_images, tile_groups;
  int extent[3];
  unsigned parts[3];
  unsigned chunks;
  BoxSteps box, out;  // `out`: wgrad's tile of gradients
  RowCopy copy, copy_out;
  WideDivider by_channels, by_extent[3];
};

// A block's tile.
struct DepthwiseBlock {
  int64_t image;
  int images;
  int group;
  int groups;
  int first[3];
  int extent[3];
  Hull box[3];
};

WEFT_DEVICE int clipped(int extent, int64_t first, int64_t end) {
  return first + extent <= end ? extent : static_cast<int>(end - first);
}

WEFT_DEVICE DepthwiseBlock depthwise_block(const DepthwiseWalk& walk, unsigned chunk,
                                           unsigned tile) {
  DepthwiseBlock b;
  b.group = static_cast<int>(chunk) * walk.tile_groups;
  b.groups = clipped(walk.tile_groups, b.group, walk.groups);
  for (int a = 2; a >= 0; --a) {
    b.first[a] = static_cast<int>(tile % walk.parts[a]) * walk.extent[a];
    tile /= walk.parts[a];
    b.extent[a] = clipped(walk.extent[a], b.first[a], walk.axis[a].target);
    b.box[a] = hull_of(walk.axis[a], b.first[a], b.extent[a]);
  }
  b.image = static_cast<int64_t>(tile) * walk.tile_images;
  b.images = clipped(walk.tile_images, b.image, walk.images);
  return b;
}

template <int kUnit, class T>
WEFT_DEVICE void copy_unit(T* to, const T* from) {
  if constexpr (kUnit * sizeof(T) >= 4)
    device::cp_async<kUnit * sizeof(T)>(to, from);
  else
    *to = device::load(from);
}

// Copies images x channels x (d, h, w), from `first` on, of a map with `each` channels a group;
// lands at the wait.
template <int kUnit, class T>
WEFT_DEVICE void copy_rows(const DepthwiseWalk& walk, const DepthwiseBlock& b, const T* map,
                           const MapSteps& steps, int each, const int (&first)[3],
                           const int (&size)[3], const BoxSteps& box, int lanes, T* shared) {
  const bool last = walk.channels_last;
  const int channels = b.groups * each;
  const T* corner = map + b.image * steps.image + b.group * each * steps.channel +
                    first[0] * steps.axis[0] + first[1] * steps.axis[1] + first[2] * steps.axis[2];
  const int planes = last ? b.images : b.images * channels;
  const int rows = planes * size[0] * size[1];
  const int units = (last ? size[2] * channels : size[2]) / kUnit;
  const int channel_units = channels / kUnit;
  for (int row = device::thread_index() / lanes; row < rows; row += device::block_size() / lanes) {
    const int h = row % size[1];
    const int d = row / size[1] % size[0];
    const int plane = row / size[1] / size[0];
    const int image = last ? plane : plane / channels;
    const int channel = last ? 0 : plane % channels;
    const T* from = corner + image * steps.image + channel * steps.channel + d * steps.axis[0] +
                    h * steps.axis[1];
    T* to = shared + image * box.image + channel * box.channel + d * box.d + h * box.h;
    for (int u = device::thread_index() % lanes; u < units; u += lanes) {
      if (last) {
        const int w = u / channel_units;
        const int c = u % channel_units * kUnit;
        copy_unit<kUnit>(to + w * box.w + c, from + w * steps.axis[2] + c);
      } else {
        copy_unit<kUnit>(to + u * kUnit, from + u * kUnit);
      }
    }
  }
}

template <class T>
WEFT_DEVICE void copy_box(const DepthwiseWalk& walk, const DepthwiseBlock& b, const T* map,
                          const MapSteps& steps, int each, const int (&first)[3],
                          const int (&size)[3], const BoxSteps& box, const RowCopy& copy,
                          T* shared) {
  constexpr int kPack = 16 / sizeof(T);
  const auto rows = [&](auto unit) {
    copy_rows<decltype(unit)::value>(walk, b, map, steps, each, first, size, box, copy.lanes,
                                     shared);
  };
  if (copy.unit == kPack) return rows(std::integral_constant<int, kPack>{});
  if constexpr (kPack > 4)
    if (copy.unit == 4) return rows(std::integral_constant<int, 4>{});
  if constexpr (kPack > 2)
    if (copy.unit == 2) return rows(std::integral_constant<int, 2>{});
  rows(std::integral_constant<int, 1>{});
}

// The channels of a block that weight `index` of it joins, as the weights lie in memory, and its
// place.
struct BlockWeight {
  int target, source, place;  // the source among those of its group
};

WEFT_DEVICE BlockWeight block_weight(const DepthwiseWalk& walk, int index) {
  const bool inverse = walk.axis[0].inverse;
  const int c = inverse ? walk.target_each : walk.source_each;
  const int k = index / (c * walk.places), rest = index % (c * walk.places);
  const int channel = walk.channels_last ? rest % c : rest / walk.places;
  const int place = walk.channels_last ? rest / c : rest % walk.places;
  if (!inverse) return {k, channel, place};
  return {k / walk.source_each * c + channel, k % walk.source_each, place};
}

// ---- on the host -------------------------------------------------------------------------------

inline BoxSteps box_steps(const ConvProblem& p, const DepthwisePlan& plan, int channels,
                          const int (&box)[3]) {
  const auto pack = static_cast<int>(16 / size_of(p.dtype));
  const auto padded = [&](int row) { return (row + pack - 1) / pack * pack; };
  BoxSteps s;
  s.w = p.channels_last ? channels : 1;
  s.h = padded(box[2] * s.w);
  s.d = box[1] * s.h;
  const int planes = box[0] * s.d;
  s.channel = p.channels_last ? 1 : planes;
  s.image = p.channels_last ? planes : channels * planes;
  s.elements = plan.images * s.image;
  return s;
}

// `run(first)` is the run of elements along W that a tile copies, in channels-last ones C.
inline RowCopy row_copy(const ConvProblem& p, const DepthwisePlan& plan, const GatherAxis& axis,
                        int64_t each, bool of_targets, const void* address) {
  const int64_t map_width = of_targets ? axis.target : axis.source;
  const int64_t size = size_of(p.dtype);
  RowCopy copy;
  const auto fits = [&](int64_t unit) {
    if (reinterpret_cast<uintptr_t>(address) % (unit * size) != 0) return false;
    if (p.channels_last) return p.groups * each % unit == 0 && plan.groups * each % unit == 0;
    if (map_width % unit != 0) return false;
    for (int64_t first = 0; first < axis.target; first += plan.extent[2]) {
      const int64_t count = std::min<int64_t>(plan.extent[2], axis.target - first);
      const Hull run = of_targets ? Hull{static_cast<int>(first), static_cast<int>(count)}
                                  : hull_of(axis, first, count);
      if (run.begin % unit != 0 || run.size % unit != 0) return false;
    }
    return true;
  };
  for (int64_t unit = 16 / size; unit > 1 && copy.unit == 1; unit /= 2)
    if (fits(unit)) copy.unit = static_cast<int>(unit);
  const int64_t row =
      (of_targets ? plan.extent[2] : plan.box[2]) * (p.channels_last ? plan.groups * each : 1);
  while (copy.lanes < 32 && copy.lanes * copy.unit < row) copy.lanes *= 2;
  return copy;
}

inline DepthwiseWalk depthwise_walk(const ConvProblem& p, const DepthwisePlan& plan, bool inverse,
                                    const void* source, const void* target) {
  DepthwiseWalk walk;
  for (int a = 0; a < 3; ++a) {
    walk.axis[a] = gather_axis(p, a, inverse);
    walk.extent[a] = plan.extent[a];
    walk.parts[a] = static_cast<unsigned>(ceil_div(walk.axis[a].target, plan.extent[a]));
    walk.by_extent[a] = WideDivider(plan.extent[a]);
  }
  walk.channels_last = p.channels_last;
  walk.images = p.n;
  walk.groups = static_cast<int>(p.groups);
  walk.source_each = static_cast<int>(inverse ? p.k : p.c);
  walk.target_each = static_cast<int>(inverse ? p.c : p.k);
  walk.places = static_cast<int>(p.window_elements());
  walk.place_step[2] = 1;
  walk.place_step[1] = static_cast<int>(p.window[2].size);
  walk.place_step[0] = static_cast<int>(p.window[1].size * p.window[2].size);
  walk.source = inverse ? out_steps(p) : in_steps(p);
  walk.target = inverse ? in_steps(p) : out_steps(p);
  walk.tile_images = plan.images;
  walk.tile_groups = plan.groups;
  walk.chunks = static_cast<unsigned>(plan.chunks);
  walk.box = box_steps(p, plan, plan.groups * walk.source_each, plan.box);
  walk.out = box_steps(p, plan, plan.groups * walk.target_each, plan.extent);
  walk.copy = row_copy(p, plan, walk.axis[2], walk.source_each, false, source);
  walk.copy_out = row_copy(p, plan, walk.axis[2], walk.target_each, true, target);
  walk.by_channels = WideDivider(plan.groups * walk.target_each);
  return walk;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
