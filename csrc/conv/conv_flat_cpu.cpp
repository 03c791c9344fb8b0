// Contiguous tensors and windows of one place; see conv/conv_flat.h and conv_flat_backward.h.
#include "conv/conv_cpu.h"
#include "conv/conv_flat.h"
#include "conv/conv_flat_backward.h"

namespace weft::WEFT_TARGET {

void conv_flat_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                      const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_flat(p, g, static_cast<const T*>(src), static_cast<const T*>(w),
                static_cast<const T*>(bias), static_cast<T*>(dst), context);
  });
}

void conv_flat_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                     const Context& context) {
  conv_flat_backward(p, {x, gy, nullptr, nullptr, nullptr, gw, nullptr}, context);
}

void conv_flat_backward(const ConvProblem& p, const ConvGradients& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward_flat<T>(p, t, context);
  });
}

}  // namespace weft::WEFT_TARGET
