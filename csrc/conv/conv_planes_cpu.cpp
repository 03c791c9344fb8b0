// Contiguous tensors of few channels; see conv/conv_planes.h.
#include "conv/conv_cpu.h"
#include "conv/conv_planes.h"
#include "conv/conv_planes_wgrad.h"

namespace weft::WEFT_TARGET {

void conv_planes_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                        const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_planes(p, g, static_cast<const T*>(src), static_cast<const T*>(w),
                  static_cast<const T*>(bias), static_cast<T*>(dst), context);
  });
}

void conv_planes_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                       const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    wgrad_planes(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw),
                 context);
  });
}

}  // namespace weft::WEFT_TARGET
