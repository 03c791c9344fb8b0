// Weight gradients of contiguous tensors through the channels-last kernel, by way of transposed
// copies.
//
// With vectors along channels each lane is a sum of its own; vectors along positions must be
// folded, and waste what a row leaves over. Copying both operands costs a pass over them.
#pragma once

#include "conv/conv_pixels_wgrad.h"
#include "conv/conv_transpose.h"

namespace weft::WEFT_TARGET {
namespace {

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
  wgrad_images(p, images, load, gw_pixels.data(), context);
  transpose(gw_pixels.data(), p.out_channels(), p.window_elements(), p.c, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
