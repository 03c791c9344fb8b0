// Convolution of contiguous tensors through the channels-last kernels, by way of transposed copies.
//
// With vectors along channels each lane is a sum of its own and nothing has edges; vectors along
// positions waste what a row leaves over and, in a wgrad, must be folded. Copying both operands
// costs a pass over them, by squares that stay in registers.
#pragma once

#include <type_traits>

#include "conv/conv_pixels.h"
#include "conv/conv_planes.h"

namespace weft::WEFT_TARGET {
namespace {

// Elements as plain bits, as many as a vector of the accumulation type has.
template <class T>
struct TransposeTile {
  static constexpr int kSize = static_cast<int>(kLanes<T>);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  using V = typename vector_of<Bits, kSize>::type;

  // A square of kSize rows and columns: zipping rows half the square apart, once per bit of the row
  // number, exchanges both numbers' bits.
  static WEFT_INLINE void run(const T* in, int64_t in_step, T* out, int64_t out_step) {
    V row[kSize];
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) memcpy(&row[i], in + i * in_step, sizeof(V));
#pragma GCC unroll 4
    for (int round = 1; round < kSize; round *= 2) {
      V next[kSize];
#pragma GCC unroll 8
      for (int i = 0; i < kSize / 2; ++i) {
        next[2 * i] = row[i];
        next[2 * i + 1] = row[i + kSize / 2];
        zip(next[2 * i], next[2 * i + 1]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kSize; ++i) row[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i)
      memcpy(static_cast<void*>(out + i * out_step), &row[i], sizeof(V));
  }
};

// [count, rows, columns] as [count, columns, rows].
template <class T>
void transpose(const T* in, int64_t count, int64_t rows, int64_t columns, T* out,
               const Context& context) {
  constexpr int64_t kSize = TransposeTile<T>::kSize;
  const int64_t bands = ceil_div(columns, kSize);
  parallel_for(context, count * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * kSize;
      const int64_t last = least(first + kSize, columns);
      const T* const from = in + task / bands * rows * columns;
      T* const to = out + task / bands * rows * columns;
      int64_t row = 0;
      if (last - first == kSize)
        for (; row + kSize <= rows; row += kSize)
          TransposeTile<T>::run(from + row * columns + first, columns, to + first * rows + row,
                                rows);
      for (; row < rows; ++row)
        for (int64_t c = first; c < last; ++c) to[c * rows + row] = from[row * columns + c];
    }
  });
}

template <class T>
void gather_transposed(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                       const T* bias, T* dst, const Context& context) {
  const int64_t src_channels = p.groups * g.src_channels;
  const int64_t dst_channels = p.groups * g.dst_channels;
  const int64_t src_image = src_channels * g.src_positions();
  const int64_t dst_image = dst_channels * g.dst_positions();
  const int64_t images = images_at_a_time(p.n, src_image + dst_image);
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
  const int64_t x_image = p.in_channels() * p.in_positions();
  const int64_t gy_image = p.out_channels() * p.out_positions();
  const int64_t images = images_at_a_time(p.n, x_image + gy_image);
  Scratch<T> x_pixels(images * x_image), gy_pixels(images * gy_image);
  Scratch<T> gw_pixels(p.weight_elements());
  const auto load = [&](int64_t n, int64_t count) {
    transpose(x + n * x_image, count, p.in_channels(), p.in_positions(), x_pixels.data(), context);
    transpose(gy + n * gy_image, count, p.out_channels(), p.out_positions(), gy_pixels.data(),
              context);
    return PixelOperands<T>{x_pixels.data(), gy_pixels.data()};
  };
  wgrad_images<T>(p, images, load, gw_pixels.data(), context);
  transpose(gw_pixels.data(), p.out_channels(), p.window_elements(), p.c, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
