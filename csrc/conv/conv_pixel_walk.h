// Which pixels a block of conv_product.h holds, where they read the source, and how a finished
// block is written.
//
// A source is channels-last: the tensor itself, or a copy with what the tile product needs around
// each row or pixel. Destination pixels are taken phase by phase, so that all of a block meet the
// same places; a finished block of sums [pixel, channel] is written in either layout.
#pragma once

#include <type_traits>

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"
#include "gemm/pack_cpu.h"
#include "gemm/pairs_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int64_t kBlockPixels = 240;  // a multiple of every tile's height

// How a source lies: [image, D, H, columns, channels], elements of the operand type.
template <class Acc>
struct PixelSource {
  const Acc* data;  // words where the product is of pairs
  int64_t pixel;    // from pixel to pixel, in words or numbers
  int64_t columns;  // of a row
  int64_t lead;     // columns of padding in front
  bool folded;      // a row of the window is one place

  int64_t image(const Gather& g) const { return g.src[0] * g.src[1] * columns * pixel; }
};

// Destination pixels that meet the same places.
struct PixelPhase {
  AxisPhase axis[3];
  int64_t first_place;  // in packing order
  int64_t places;

  int64_t image() const { return axis[0].count * axis[1].count * axis[2].count; }
};

struct Place {
  int64_t at[3];
};

// Lists places by the phases that meet them.
inline void list_phases(const ConvProblem& p, const Gather& g, bool folded, PixelPhase* phases,
                        Place* places) {
  int64_t count = 0, listed = 0;
  int64_t steps[3];
  for (int axis = 0; axis < 3; ++axis) steps[axis] = g.transposed ? p.window[axis].stride : 1;
  for (int64_t d = 0; d < least(steps[0], g.dst[0]); ++d)
    for (int64_t h = 0; h < least(steps[1], g.dst[1]); ++h)
      for (int64_t w = 0; w < least(steps[2], g.dst[2]); ++w) {
        const int64_t first[3] = {d, h, w};
        PixelPhase& phase = phases[count++];
        for (int axis = 0; axis < 3; ++axis)
          phase.axis[axis] = {first[axis], steps[axis],
                              ceil_div(g.dst[axis] - first[axis], steps[axis])};
        phase.first_place = listed;
        const auto meets = [&](int axis, int64_t k) {
          const Window& window = p.window[axis];
          return (first[axis] + window.padding - k * window.dilation) % steps[axis] == 0;
        };
        for (int64_t i = 0; i < p.window[0].size; ++i)
          for (int64_t j = 0; j < p.window[1].size; ++j)
            for (int64_t l = 0; l < (folded ? 1 : p.window[2].size); ++l)
              if (meets(0, i) && meets(1, j) && meets(2, l)) places[listed++] = {{i, j, l}};
        phase.places = listed - phase.first_place;
        // Few pixels have padding at the middle place: the last, at which a block is finished.
        if (phase.places > 1) {
          Place& middle = places[phase.first_place + phase.places / 2];
          const Place last = places[listed - 1];
          places[listed - 1] = middle, middle = last;
        }
      }
}

// The block's pixels, as runs of one row each.
struct PixelRun {
  int64_t n, d, h, w;  // of the destination; the next pixel is one step on
  int64_t first;       // of the block
  int64_t count;
};

inline int64_t list_runs(const PixelPhase& phase, int64_t begin, int64_t end, PixelRun* runs) {
  int64_t count = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t column = at % phase.axis[2].count;
    const int64_t row = at / phase.axis[2].count;
    const int64_t taken = least(phase.axis[2].count - column, end - at);
    const auto position = [&](int axis, int64_t i) {
      return phase.axis[axis].first + i * phase.axis[axis].step;
    };
    runs[count++] = {row / phase.axis[1].count / phase.axis[0].count,
                     position(0, row / phase.axis[1].count % phase.axis[0].count),
                     position(1, row % phase.axis[1].count),
                     position(2, column),
                     at - begin,
                     taken};
    at += taken;
  }
  return count;
}

// Where the pixels of the runs read the source at a place; returns how many do.
template <class Acc>
int64_t find_pixels(const ConvProblem& p, const Gather& g, const PixelSource<Acc>& source,
                    const Acc* zeros, const PixelRun* runs, int64_t run_count, const Place& place,
                    const Acc** out) {
  int64_t reads = 0;
  const Window& window = p.window[2];
  for (int64_t i = 0; i < run_count; ++i) {
    const PixelRun& run = runs[i];
    const int64_t slice = source_of(p.window[0], run.d, place.at[0], g.src[0], g.transposed);
    const int64_t row = source_of(p.window[1], run.h, place.at[1], g.src[1], g.transposed);
    if (slice < 0 || row < 0) {
      for (int64_t q = 0; q < run.count; ++q) out[run.first + q] = zeros;
      continue;
    }
    const Acc* const from = source.data + run.n * source.image(g) +
                            (slice * g.src[1] + row) * source.columns * source.pixel;
    // From pixel to pixel of a run: a dgrad's are a stride apart.
    int64_t column, step;
    if (g.transposed) {
      column = (run.w + window.padding - place.at[2] * window.dilation) / window.stride;
      step = 1;
    } else {
      column = window.first_input(run.w) + place.at[2] * window.dilation + source.lead;
      step = window.stride;
    }
    for (int64_t q = 0; q < run.count; ++q, column += step) {
      const bool inside = static_cast<uint64_t>(column) < static_cast<uint64_t>(source.columns);
      out[run.first + q] = inside ? from + column * source.pixel : zeros;
      reads += inside;
    }
  }
  return reads;
}

// `count` images as [image, D, H, columns, channels] with zeros where columns are padding or, for
// products of pairs, an odd group of channels has its partner.
template <class T, class S>
void copy_padded(const ConvProblem& p, const Gather& g, const T* src, int64_t count, int64_t lead,
                 int64_t columns, int64_t channels, S* out, const Context& context) {
  const int64_t rows = g.src[0] * g.src[1];
  const int64_t all = p.groups * g.src_channels;
  const int64_t column_step = p.channels_last ? all : 1;
  const int64_t channel_step = p.channels_last ? 1 : g.src_positions();
  const int64_t pixel = p.groups * channels;
  parallel_for(context, count * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const from =
          src + row / rows * all * g.src_positions() + row % rows * g.src[2] * column_step;
      S* const to = out + row * columns * pixel;
      const auto copy = [&](S* at, const T* value) {
        if constexpr (std::is_same_v<T, S>)
          *at = *value;
        else
          *at = widen(*value);
      };
      fill(to, lead * pixel, S{});
      S* const inner = to + lead * pixel;
      if (channels == g.src_channels) {
        for (int64_t w = 0; w < g.src[2]; ++w)
          for (int64_t c = 0; c < all; ++c)
            copy(inner + w * pixel + c, from + w * column_step + c * channel_step);
      } else {
        fill(inner, g.src[2] * pixel, S{});
        for (int64_t c = 0; c < all; ++c)
          for (int64_t w = 0; w < g.src[2]; ++w)
            copy(inner + w * pixel + c / g.src_channels * channels + c % g.src_channels,
                 from + w * column_step + c * channel_step);
      }
      S* const end = inner + g.src[2] * pixel;
      fill(end, to + columns * pixel - end, S{});
    }
  });
}

// Destination pixels of a finished block that lie `step` apart in one image.
struct PixelSegment {
  int64_t n;
  int64_t at;     // of the image's positions
  int64_t first;  // of the block
  int64_t count;
};

// Where each pixel of the runs lies in a channels-last destination.
template <class T>
void list_pixels(const Gather& g, const PixelRun* runs, int64_t run_count, int64_t step, T* dst,
                 int64_t dst_pixel, T** out) {
  for (int64_t i = 0; i < run_count; ++i) {
    const PixelRun& run = runs[i];
    T* to = dst + (((run.n * g.dst[0] + run.d) * g.dst[1] + run.h) * g.dst[2] + run.w) * dst_pixel;
    for (int64_t q = 0; q < run.count; ++q, to += step * dst_pixel) out[run.first + q] = to;
  }
}

// Runs that follow one another are one segment.
inline int64_t list_segments(const Gather& g, const PixelRun* runs, int64_t run_count, bool joined,
                             PixelSegment* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < run_count; ++i) {
    const PixelRun& run = runs[i];
    if (joined && count > 0 && out[count - 1].n == run.n)
      out[count - 1].count += run.count;
    else
      out[count++] = {run.n, (run.d * g.dst[1] + run.h) * g.dst[2] + run.w, run.first, run.count};
  }
  return count;
}

// The first `left` of a vector of sums, if there are not more.
template <bool kPairs, class T>
WEFT_INLINE void store_sums(T* address, Vec<accumulate_t<T>> sums, int64_t left) {
  if (left < kLanes<T>) return store_part(address, sums, static_cast<int>(left));
  if constexpr (kPairs)
    store_rounded(address, sums);
  else
    store_vec(address, sums);
}

// Sums [pixel, lane], `sum_row` apart, as channels of a channels-last destination.
template <bool kPairs, class T>
void store_pixels(const ConvProblem& p, const PixelSegment& segment, int64_t step,
                  const accumulate_t<T>* sums, int64_t sum_row, const accumulate_t<T>* bias, T* dst,
                  int64_t dst_pixel, int64_t lanes) {
  for (int64_t q = 0; q < segment.count; ++q) {
    T* const to = dst + q * step * dst_pixel;
    const accumulate_t<T>* const from = sums + q * sum_row;
    for (int64_t j = 0; j < lanes; j += kLanes<T>)
      store_sums<kPairs>(to + j, load_vec(from + j) + load_vec(bias + j), lanes - j);
    if (p.activation != Activation::none) activate_row(p, to, lanes);
  }
}

// The same for a contiguous destination, whose channels are `plane` apart.
template <bool kPairs, class T>
void store_planes(const ConvProblem& p, const PixelSegment& segment, int64_t step,
                  const accumulate_t<T>* sums, int64_t sum_row, const accumulate_t<T>* bias, T* dst,
                  int64_t plane, int64_t lanes) {
  constexpr int kLane = kLanes<T>;
  T line[kLane * kBlockPixels];  // of pixels that are not neighbours
  for (int64_t j = 0; j < lanes; j += kLane) {
    const int64_t rows = least(kLane, lanes - j);
    const auto start = load_vec(bias + j);
    T* const to = step > 1 ? line : dst + j * plane;
    const int64_t pitch = step > 1 ? kBlockPixels : plane;
    for (int64_t q = 0; q < segment.count; q += kLane) {
      const int64_t pixels = least(kLane, segment.count - q);
      Vec<accumulate_t<T>> square[kLane];
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i)
        square[i] =
            i < pixels ? load_vec(sums + (q + i) * sum_row + j) + start : Vec<accumulate_t<T>>{};
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i) {
        if (i >= rows) continue;
        store_sums<kPairs>(to + i * pitch + q, square[i], pixels);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      activate_row(p, to + i * pitch, segment.count);
      if (step > 1)
        for (int64_t q = 0; q < segment.count; ++q)
          dst[(j + i) * plane + q * step] = line[i * kBlockPixels + q];
    }
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
