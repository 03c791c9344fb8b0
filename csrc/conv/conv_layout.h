// Convolution of contiguous tensors through the channels-last kernels, by way of transposed copies.
//
// A dense wgrad is a product over positions whose sums are weights: with vectors along channels
// each lane is a weight of its own, while vectors along positions must be folded, which on short
// rows of many channels costs more than the product. Copying both operands costs a pass over them.
#pragma once

#include "conv/conv_pixels.h"

namespace weft::WEFT_TARGET {
namespace {

// [count, rows, columns] as [count, columns, rows].
template <class T>
void transpose(const T* in, int64_t count, int64_t rows, int64_t columns, T* out,
               const Context& context) {
  constexpr int64_t kBlock = 16;
  const int64_t bands = ceil_div(columns, kBlock);
  parallel_for(context, count * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * kBlock;
      const int64_t last = least(first + kBlock, columns);
      const T* const from = in + task / bands * rows * columns;
      T* const to = out + task / bands * rows * columns;
      for (int64_t row = 0; row < rows; row += kBlock)
        for (int64_t c = first; c < last; ++c)
          for (int64_t r = row; r < least(row + kBlock, rows); ++r)
            to[c * rows + r] = from[r * columns + c];
    }
  });
}

template <class T>
void wgrad_transposed(const ConvProblem& p, const T* x, const T* gy, T* gw,
                      const Context& context) {
  Scratch<T> x_pixels(p.in_elements()), gy_pixels(p.out_elements()), gw_pixels(p.weight_elements());
  transpose(x, p.n, p.in_channels(), p.in_positions(), x_pixels.data(), context);
  transpose(gy, p.n, p.out_channels(), p.out_positions(), gy_pixels.data(), context);
  wgrad_pixels(p, x_pixels.data(), gy_pixels.data(), gw_pixels.data(), context);
  transpose(gw_pixels.data(), p.out_channels(), p.window_elements(), p.c, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
