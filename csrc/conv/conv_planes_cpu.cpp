// Tensors of few channels; see conv/conv_planes.h and, channels-last, conv/conv_planes_last.h.
#include "conv/conv_cpu.h"
#include "conv/conv_planes_last.h"

namespace weft::WEFT_TARGET {

void conv_planes_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                        const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto *from = static_cast<const T*>(src), *weights = static_cast<const T*>(w),
               *start = static_cast<const T*>(bias);
    auto* to = static_cast<T*>(dst);
    if (p.channels_last)
      return gather_planes_last(p, transposed, from, weights, start, to, context);
    gather_planes(p, g, from, weights, start, to, context);
  });
}

void conv_planes_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                       const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? wgrad_planes_last<T> : wgrad_planes<T>;
    run(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw), context);
  });
}

}  // namespace weft::WEFT_TARGET
