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

// Images go a few at a time, which bounds the copies.
template <class T>
void gather_transposed(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                       const T* bias, T* dst, const Context& context) {
  constexpr int64_t kElements = 1 << 20;
  const int64_t src_channels = p.groups * g.src_channels;
  const int64_t dst_channels = p.groups * g.dst_channels;
  const int64_t src_image = src_channels * g.src_positions();
  const int64_t dst_image = dst_channels * g.dst_positions();
  const int64_t images = least(p.n, most(1, kElements / (src_image + dst_image)));
  Scratch<T> w(p.weight_elements()), from(images * src_image), to(images * dst_image);
  transpose(weights, p.out_channels(), p.c, p.window_elements(), w.data(), context);
  ConvProblem part = p;
  for (int64_t n = 0; n < p.n; n += images) {
    part.n = least(images, p.n - n);
    transpose(src + n * src_image, part.n, src_channels, g.src_positions(), from.data(), context);
    gather_pixels(part, g, from.data(), w.data(), bias, to.data(), context);
    transpose(to.data(), part.n, g.dst_positions(), dst_channels, dst + n * dst_image, context);
  }
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
