// Weight gradients along the channels; see conv/conv_layout_wgrad.h.
#include "conv/conv_cpu.h"
#include "conv/conv_layout_wgrad.h"

namespace weft::WEFT_TARGET {

void conv_product_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                        const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    wgrad_product(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw),
                  context);
  });
}

}  // namespace weft::WEFT_TARGET
