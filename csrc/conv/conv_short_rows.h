// fprop of depthwise convolution with windows of 3, 5 or 7 and stride 1, of contiguous maps whose
// rows are no longer than a vector, on CPU.
//
// A task is a plane. A tile of a few output rows stays in registers while, column by column of the
// window, each row of the input is read where it lies, its ends masked, and meets all the outputs
// whose windows hold it; rows outside are passed over. Nothing is copied to scratch, which on such
// maps takes as long as the sums. Bound: FLOPs, with the lanes past a row's end empty. Tried and
// lost: tiles over scratch (conv_rows.h), which longer rows and other windows take.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_lane_span.h"
#include "conv/conv_registers.h"
#include "core/row_writer.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int kShortTiles[] = {4, 7};  // output rows

template <class T>
struct ShortRows {
  using Acc = accumulate_t<T>;

  const ConvProblem& p;
  const T* x;
  const Acc* weights;
  Acc start;
  T* y;

  // Output rows [first, first + kRows), of those that there are.
  template <int kSize, int kRows>
  __attribute__((noinline)) void tile(int64_t first) const {
    const int64_t width = p.in[2], top = first - p.window[1].padding;
    Vec<Acc> sum[kRows];
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r) sum[r] = Vec<Acc>{} + start;
    for (int64_t l = 0; l < kSize; ++l) {
      const int64_t lead = p.window[2].padding - l;
      const LaneSpan span(lead, lead + width, kLanes<T>);
      const T* from = x + top * width - lead;
      Vec<Acc> weight[kSize];
#pragma GCC unroll 7
      for (int k = 0; k < kSize; ++k) weight[k] = Vec<Acc>{} + weights[k * kSize + l];
#pragma GCC unroll 16
      for (int i = 0; i < kRows + kSize - 1; ++i, from = computed(from + width)) {
        if (top + i < 0 || top + i >= p.in[1]) continue;
        const Vec<Acc> value = in_register(span.load(from));
#pragma GCC unroll 7
        for (int r = 0; r < kRows; ++r)
          if (i - r >= 0 && i - r < kSize) sum[r] += weight[i - r] * value;
      }
    }
    const LaneSpan columns(0, p.out[2], kLanes<T>);
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
      if (first + r < p.out[1]) columns.store(y + (first + r) * p.out[2], sum[r]);
  }

  template <int kSize>
  void plane() const {
    constexpr int kFew = kShortTiles[0], kMany = kShortTiles[1];
    const int64_t few = round_up(p.out[1], kFew), many = round_up(p.out[1], kMany);
    if (few < many)
      for (int64_t row = 0; row < few; row += kFew) tile<kSize, kFew>(row);
    else
      for (int64_t row = 0; row < many; row += kMany) tile<kSize, kMany>(row);
  }
};

template <class T>
void gather_short_rows(const ConvProblem& p, const T* x, const T* weights, const T* bias, T* y,
                       const Context& context) {
  const Widened<T> wide(weights, p.weight_elements(), context);
  const int64_t in = p.in_positions(), out = p.out_positions();
  const int64_t ahead = planes_ahead(p) * in;
  parallel_for(context, p.n * p.groups, 1, [&](int64_t begin, int64_t end) {
    RowWriter<T> writer(y + begin * out, out, conv_streams(p.out_elements() * size_of(p.dtype)));
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t channel = plane % p.groups;
      const ShortRows<T> rows = {p, x + plane * in, wide.data() + channel * p.window_elements(),
                                 bias != nullptr ? widen(bias[channel]) : accumulate_t<T>{0},
                                 writer.row()};
      for (int64_t i = 0; i < in; i += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(rows.x + ahead + i, 0, 2);
      if (p.window[1].size == 3)
        rows.template plane<3>();
      else if (p.window[1].size == 5)
        rows.template plane<5>();
      else
        rows.template plane<7>();
      activate_row(p, rows.y, out);
      writer.advance(out);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
