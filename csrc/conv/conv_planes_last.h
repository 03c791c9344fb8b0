// Channels-last tensors of very few channels on CPU, by way of contiguous copies.
//
// A vector along a few channels is mostly empty, while the kernels of conv_planes.h fill theirs
// with positions. That is worth a pass over both maps.
#pragma once

#include "conv/conv_planes.h"
#include "conv/conv_planes_wgrad.h"
#include "conv/conv_transpose.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
void gather_planes_last(const ConvProblem& p, bool transposed, const T* src, const T* weights,
                        const T* bias, T* dst, const Context& context) {
  ConvProblem q = p;
  q.channels_last = false;
  const Gather g = transposed ? dgrad_gather(q) : fprop_gather(q);
  const int64_t src_channels = p.groups * g.src_channels, dst_channels = p.groups * g.dst_channels;
  const int64_t src_image = src_channels * g.src_positions();
  const int64_t dst_image = dst_channels * g.dst_positions();
  Scratch<T> filters(p.weight_elements());
  transpose(weights, p.out_channels(), p.window_elements(), p.c, filters.data(), context);
  const int64_t images = images_at_a_time(p.n, src_image + dst_image);
  Scratch<T> from(images * src_image), to(images * dst_image);
  for (int64_t n = 0; n < p.n; n += images) {
    q.n = least(images, p.n - n);
    transpose(src + n * src_image, q.n, g.src_positions(), src_channels, from.data(), context);
    gather_planes(q, g, from.data(), filters.data(), bias, to.data(), context);
    transpose(to.data(), q.n, dst_channels, g.dst_positions(), dst + n * dst_image, context);
  }
}

template <class T>
void wgrad_planes_last(const ConvProblem& p, const T* x, const T* gy, T* gw,
                       const Context& context) {
  ConvProblem q = p;
  q.channels_last = false;
  Scratch<T> x_planes(p.in_elements()), gy_planes(p.out_elements()), filters(p.weight_elements());
  transpose(x, p.n, p.in_positions(), p.in_channels(), x_planes.data(), context);
  transpose(gy, p.n, p.out_positions(), p.out_channels(), gy_planes.data(), context);
  wgrad_planes(q, x_planes.data(), gy_planes.data(), filters.data(), context);
  transpose(filters.data(), p.out_channels(), p.c, p.window_elements(), gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
