// Weight gradients of both layouts through the channels-last kernel, contiguous ones by way of
// transposed copies.
//
// With vectors along channels each lane is a sum of its own; vectors along positions must be
// folded, and waste what a row leaves over. Copying both operands costs a pass over them; of few
// channels, x is copied with its padding, see `folds`.
#pragma once

#include "conv/conv_pixel_walk.h"
#include "conv/conv_pixels_wgrad.h"
#include "conv/conv_transpose.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
void wgrad_product(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  const bool planes = !p.channels_last, folded = folds(p);
  const WgradWalk walk = folded ? folded_walk(p) : plain_walk(p);
  const int64_t x_image = p.in_channels() * p.in_positions();
  const int64_t gy_image = walk.gy_image();
  const int64_t images = planes || folded ? images_at_a_time(p.n, walk.x_image() + gy_image) : p.n;
  Scratch<T> x_pixels(planes || folded ? images * walk.x_image() : 0);
  Scratch<T> gy_pixels(planes ? images * gy_image : 0);
  const bool turns = planes && p.window_elements() > 1;  // gw
  Scratch<T> gw_pixels(turns ? p.weight_elements() : 0);
  const auto load = [&](int64_t n, int64_t count) {
    PixelOperands<T> operands = {x + n * x_image, gy + n * gy_image};
    if (folded)
      copy_padded(p, fprop_gather(p), operands.x, count, p.window[2].padding,
                  walk.x_row / walk.x_pixel, p.c, x_pixels.data(), context);
    else if (planes)
      transpose(operands.x, count, p.in_channels(), p.in_positions(), x_pixels.data(), context);
    if (planes)
      transpose(operands.gy, count, p.out_channels(), p.out_positions(), gy_pixels.data(), context);
    if (planes || folded) operands.x = x_pixels.data();
    if (planes) operands.gy = gy_pixels.data();
    return operands;
  };
  wgrad_images(walk, images, load, turns ? gw_pixels.data() : gw, context);
  if (turns) transpose(gw_pixels.data(), p.out_channels(), p.window_elements(), p.c, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
