// Pooling over regions (RoI pooling) as plain data.
//
// A region is a box of one image's map, divided into out[0] x out[1] bins; each bin gives one
// output a channel. It is five int64: image, y, x, height, width, in positions of the map. A region
// may reach over the map's edge: a bin keeps what of it lies inside, and one that keeps nothing
// gives 0.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"
#include "core/window.h"

namespace weft {

struct RegionProblem {
  DType dtype = DType::f32;
  int64_t images = 0;
  int64_t channels = 0;
  int64_t regions = 0;
  int64_t in[2] = {1, 1};   // H, W of the map
  int64_t out[2] = {1, 1};  // bins along H and W of a region
  bool channels_last = false;

  constexpr int64_t in_positions() const { return in[0] * in[1]; }
  constexpr int64_t bins() const { return out[0] * out[1]; }
  constexpr int64_t in_elements() const { return images * channels * in_positions(); }
  constexpr int64_t out_elements() const { return regions * channels * bins(); }

  // Offsets of an element of the map [images, C, H, W] and of the output [regions, C, bins].
  WEFT_HD int64_t in_offset(int64_t image, int64_t channel, int64_t position) const {
    return channels_last ? (image * in_positions() + position) * channels + channel
                         : (image * channels + channel) * in_positions() + position;
  }
  WEFT_HD int64_t out_offset(int64_t region, int64_t channel, int64_t bin) const {
    return channels_last ? (region * bins() + bin) * channels + channel
                         : (region * channels + channel) * bins() + bin;
  }
};

struct Region {
  int64_t image;
  int64_t begin[2];   // y, x
  int64_t extent[2];  // height, width; 0 for a region of no image
};

constexpr int kRegionNumbers = 5;

// A region from its five numbers; whatever they are, its bins lie in the map.
WEFT_HD Region make_region(const RegionProblem& p, int64_t image, int64_t y, int64_t x,
                           int64_t height, int64_t width) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto within = [](int64_t value, int64_t least) {
    return value < least ? least : value > kMost ? kMost : value;
  };
  const bool known = image >= 0 && image < p.images;
  return {known ? image : 0,
          {within(y, -kMost), within(x, -kMost)},
          {known ? within(height, 0) : 0, known ? within(width, 0) : 0}};
}

// Bin `bin` of `bins` along an axis, clipped to the map's `limit` positions:
// begin + [floor(bin * extent / bins), ceil((bin + 1) * extent / bins)).
WEFT_HD Range bin_range(int64_t begin, int64_t extent, int64_t bins, int64_t bin, int64_t limit) {
  const int64_t first = begin + bin * extent / bins;
  const int64_t last = begin + ceil_div((bin + 1) * extent, bins);
  return {first < 0 ? 0 : first, last > limit ? limit : last};
}

// Positions of a bin; its ranges are reversed where it lies outside the map.
WEFT_HD int64_t area(const Range& rows, const Range& columns) {
  if (rows.end <= rows.begin || columns.end <= columns.begin) return 0;
  return (rows.end - rows.begin) * (columns.end - columns.begin);
}

// The bins along an axis that may hold one of `positions`.
WEFT_HD Range bins_meeting(int64_t begin, int64_t extent, int64_t bins, const Range& positions) {
  const int64_t first = positions.begin < begin ? begin : positions.begin;
  const int64_t last = (positions.end < begin + extent ? positions.end : begin + extent) - 1;
  if (first > last) return {0, 0};
  return {(first - begin) * bins / extent, ceil_div((last - begin + 1) * bins, extent)};
}

// Pointers are to elements of `dtype`; `regions` is [regions, 5].
struct RegionKernels {
  // The layout that the forward kernels read x in: channels-last always, or that of the output.
  bool reads_channels_last;
  // y [out] = max of each bin; places [out], which may be null: the maximum's position in the
  // [H, W] map, -1 for an empty bin. Ties: the first position; NaN: the last.
  void (*max_forward)(const RegionProblem&, const void* x, const int64_t* regions, void* y,
                      int32_t* places, const Context&);
  // gx [in] = for each input the sum of gy [out] over the bins whose maximum it is.
  void (*max_backward)(const RegionProblem&, const void* gy, const int64_t* regions,
                       const int32_t* places, void* gx, const Context&);
  // y [out] = x at each bin's place, 0 for empty bins: the transpose of max_backward.
  void (*max_pick)(const RegionProblem&, const void* x, const int64_t* regions,
                   const int32_t* places, void* y, const Context&);
  // y [out] = mean of each bin.
  void (*avg_forward)(const RegionProblem&, const void* x, const int64_t* regions, void* y,
                      const Context&);
  // gx [in] = for each input the sum of gy / elements of the bin, over the bins that hold it.
  void (*avg_backward)(const RegionProblem&, const void* gy, const int64_t* regions, void* gx,
                       const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(RegionKernels, region_kernels)

}  // namespace weft
