// Convolution on CPU: contiguous tensors as flat planes (conv_planes.h), or, where depthwise, by
// conv_rows.h and conv_rows_wgrad.h; channels-last ones pixel by pixel (conv_pixels.h), or, where
// depthwise, by conv_depthwise.h. Contiguous ones of enough channels for vectors along them take
// the way of conv_layout.h.
#include "conv/conv.h"
#include "conv/conv_depthwise.h"
#include "conv/conv_layout.h"
#include "conv/conv_pixels.h"
#include "conv/conv_planes.h"
#include "conv/conv_rows.h"
#include "conv/conv_rows_wgrad.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
void gather(const ConvProblem& p, const Gather& g, const void* src, const void* w, const void* bias,
            void* dst, const Context& context) {
  const auto run = p.channels_last ? (is_depthwise(p) ? depthwise_gather<T> : gather_pixels<T>)
                   : p.c == 1 && p.k == 1         ? gather_rows<T>
                   : least(p.c, p.k) >= kLanes<T> ? gather_transposed<T>
                                                  : gather_planes<T>;
  run(p, g, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias),
      static_cast<T*>(dst), context);
}

void launch_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    gather<typename decltype(tag)::type>(p, fprop_gather(p), x, w, bias, y, context);
  });
}

void launch_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias, void* gx,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    gather<typename decltype(tag)::type>(p, dgrad_gather(p), gy, w, bias, gx, context);
  });
}

void launch_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = most(p.c, p.k) >= kLanes<T>;
    const auto run = p.channels_last ? (is_depthwise(p) ? depthwise_wgrad<T> : wgrad_pixels<T>)
                     : p.c == 1 && p.k == 1 ? wgrad_rows<T>
                     : wide                 ? wgrad_transposed<T>
                                            : wgrad_planes<T>;
    run(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw), context);
  });
}

void launch_bias_grad(const ConvProblem& p, const void* gy, void* gb, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? bias_grad_pixels<T> : bias_grad_planes<T>;
    run(p, static_cast<const T*>(gy), static_cast<T*>(gb), context);
  });
}

}  // namespace

const ConvKernels conv_kernels = {launch_fprop, launch_dgrad, launch_wgrad, launch_bias_grad};

}  // namespace weft::WEFT_TARGET
