// Pooling over regions on CUDA: the window walk with a box per region, one thread per element.
//
// Forward: a thread owns one output and walks its bin. Backward: a thread owns one *input*, goes
// through all regions in order and gathers from the bins that hold it, so nothing is atomic and the
// bits never change (torchvision's backward adds atomically). Neighbouring threads own neighbouring
// elements in memory: channels of a bin (channels-last), bins of a channel (contiguous). Forward is
// bound by bytes: the outputs, and the map, whose positions in several regions come from cache.
// Backward is bound by the test of each region against each position, one comparison of four
// numbers that all threads of a warp share.
#include <limits>

#include "device/device.h"
#include "pool/region.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = 256;

// An index into [outer, C, inner] or, channels-last, [outer, inner, C].
struct Element {
  int64_t outer, channel, inner;
};

WEFT_DEVICE Element split(const RegionProblem& p, int64_t flat, int64_t inner) {
  if (p.channels_last)
    return {flat / (p.channels * inner), flat % p.channels, flat / p.channels % inner};
  return {flat / (p.channels * inner), flat / inner % p.channels, flat % inner};
}

WEFT_DEVICE int64_t global_thread() {
  return device::block_index() * device::block_size() + device::thread_index();
}

WEFT_DEVICE Region read_region(const RegionProblem& p, const int64_t* regions, int64_t index) {
  const int64_t* r = regions + index * kRegionNumbers;
  return make_region(p, load(r), load(r + 1), load(r + 2), load(r + 3), load(r + 4));
}

// The rows and columns of the bin that is output `e`.
WEFT_DEVICE void bin_of(const RegionProblem& p, const Region& region, const Element& e, Range& rows,
                        Range& columns) {
  rows = bin_range(region.begin[0], region.extent[0], p.out[0], e.inner / p.out[1], p.in[0]);
  columns = bin_range(region.begin[1], region.extent[1], p.out[1], e.inner % p.out[1], p.in[1]);
}

template <class T, bool kKeepPlaces>
WEFT_GLOBAL WEFT_HOT void region_max_forward(RegionProblem p, const T* x, const int64_t* regions,
                                             T* y, int32_t* places) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const Region region = read_region(p, regions, e.outer);
  Range rows, columns;
  bin_of(p, region, e, rows, columns);
  using Acc = accumulate_t<T>;
  Acc best = -std::numeric_limits<Acc>::infinity();
  int64_t place = -1;
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = columns.begin; w < columns.end; ++w) {
      const int64_t at = h * p.in[1] + w;
      const Acc value = widen(load(x + p.in_offset(region.image, e.channel, at)));
      if (value > best || value != value || place < 0) {
        best = value;
        place = at;
      }
    }
  store(y + index, narrow<T>(place < 0 ? Acc{0} : best));
  if constexpr (kKeepPlaces) store(places + index, static_cast<int32_t>(place));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_max_backward(RegionProblem p, const T* gy, const int64_t* regions,
                                              const int32_t* places, T* gx) {
  const int64_t index = global_thread();
  if (index >= p.in_elements()) return;
  const Element e = split(p, index, p.in_positions());
  accumulate_t<T> sum = 0;
  for (int64_t k = 0; k < p.regions; ++k) {
    const Region region = read_region(p, regions, k);
    if (region.image != e.outer) continue;
    const Range bh = bins_covering(region.begin[0], region.extent[0], p.out[0], e.inner / p.in[1]);
    const Range bw = bins_covering(region.begin[1], region.extent[1], p.out[1], e.inner % p.in[1]);
    for (int64_t i = bh.begin; i < bh.end; ++i)
      for (int64_t j = bw.begin; j < bw.end; ++j) {
        const int64_t output = p.out_offset(k, e.channel, i * p.out[1] + j);
        if (load(places + output) == e.inner) sum += widen(load(gy + output));
      }
  }
  store(gx + index, narrow<T>(sum));
}

template <class T>
WEFT_GLOBAL void region_max_pick(RegionProblem p, const T* x, const int64_t* regions,
                                 const int32_t* places, T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const int64_t image = read_region(p, regions, e.outer).image;
  const int32_t place = load(places + index);
  const bool inside = place >= 0 && place < p.in_positions();
  store(y + index, inside ? load(x + p.in_offset(image, e.channel, place)) : T{});
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_avg_forward(RegionProblem p, const T* x, const int64_t* regions,
                                             T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const Region region = read_region(p, regions, e.outer);
  Range rows, columns;
  bin_of(p, region, e, rows, columns);
  using Acc = accumulate_t<T>;
  Acc sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    Acc row = 0;  // a sum of sums loses fewer bits than one long sum
    for (int64_t w = columns.begin; w < columns.end; ++w)
      row += widen(load(x + p.in_offset(region.image, e.channel, h * p.in[1] + w)));
    sum += row;
  }
  const int64_t count = area(rows, columns);
  store(y + index, narrow<T>(count == 0 ? Acc{0} : sum / static_cast<Acc>(count)));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_avg_backward(RegionProblem p, const T* gy, const int64_t* regions,
                                              T* gx) {
  const int64_t index = global_thread();
  if (index >= p.in_elements()) return;
  const Element e = split(p, index, p.in_positions());
  using Acc = accumulate_t<T>;
  Acc sum = 0;
  for (int64_t k = 0; k < p.regions; ++k) {
    const Region region = read_region(p, regions, k);
    if (region.image != e.outer) continue;
    const Range bh = bins_covering(region.begin[0], region.extent[0], p.out[0], e.inner / p.in[1]);
    const Range bw = bins_covering(region.begin[1], region.extent[1], p.out[1], e.inner % p.in[1]);
    for (int64_t i = bh.begin; i < bh.end; ++i)
      for (int64_t j = bw.begin; j < bw.end; ++j) {
        const int64_t bin = i * p.out[1] + j;
        Range rows, columns;
        bin_of(p, region, {k, e.channel, bin}, rows, columns);
        sum += widen(load(gy + p.out_offset(k, e.channel, bin))) /
               static_cast<Acc>(area(rows, columns));
      }
  }
  store(gx + index, narrow<T>(sum));
}

// ---- launchers -------------------------------------------------------------------------------

device::Launch one_thread_each(const char* kernel, int64_t elements, const Context& context) {
  return {kernel, ceil_div(elements, kThreads), kThreads, 0, context.stream};
}

void launch_max_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                        int32_t* places, const Context& context) {
  const auto config = one_thread_each("region_max_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config,
                   places == nullptr ? region_max_forward<T, false> : region_max_forward<T, true>,
                   p, static_cast<const T*>(x), regions, static_cast<T*>(y), places);
  });
}

void launch_max_backward(const RegionProblem& p, const void* gy, const int64_t* regions,
                         const int32_t* places, void* gx, const Context& context) {
  const auto config = one_thread_each("region_max_backward", p.in_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_max_backward<T>, p, static_cast<const T*>(gy), regions, places,
                   static_cast<T*>(gx));
  });
}

void launch_max_pick(const RegionProblem& p, const void* x, const int64_t* regions,
                     const int32_t* places, void* y, const Context& context) {
  const auto config = one_thread_each("region_max_pick", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_max_pick<T>, p, static_cast<const T*>(x), regions, places,
                   static_cast<T*>(y));
  });
}

void launch_avg_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                        const Context& context) {
  const auto config = one_thread_each("region_avg_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_avg_forward<T>, p, static_cast<const T*>(x), regions,
                   static_cast<T*>(y));
  });
}

void launch_avg_backward(const RegionProblem& p, const void* gy, const int64_t* regions, void* gx,
                         const Context& context) {
  const auto config = one_thread_each("region_avg_backward", p.in_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_avg_backward<T>, p, static_cast<const T*>(gy), regions,
                   static_cast<T*>(gx));
  });
}

}  // namespace

const RegionKernels region_kernels = {
    .reads_channels_last = false,
    .max_forward = launch_max_forward,
    .max_backward = launch_max_backward,
    .max_pick = launch_max_pick,
    .avg_forward = launch_avg_forward,
    .avg_backward = launch_avg_backward,
};

}  // namespace weft::WEFT_TARGET
