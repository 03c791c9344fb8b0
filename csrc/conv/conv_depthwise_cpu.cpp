// Depthwise convolution; see conv/conv_rows.h and, channels-last, conv/conv_depthwise.h.
#include "conv/conv_cpu.h"
#include "conv/conv_depthwise_backward.h"
#include "conv/conv_rows_backward.h"

namespace weft::WEFT_TARGET {

void conv_depthwise_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                           const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? depthwise_gather<T> : gather_rows<T>;
    run(p, g, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias),
        static_cast<T*>(dst), context);
  });
}

void conv_depthwise_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                          const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? depthwise_wgrad<T> : wgrad_rows<T>;
    run(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw), context);
  });
}

void conv_depthwise_backward(const ConvProblem& p, const ConvGradients& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? backward_pixels<T> : backward_rows<T>;
    run(p, t, context);
  });
}

}  // namespace weft::WEFT_TARGET
