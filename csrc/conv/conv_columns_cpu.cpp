// Contiguous tensors of few input channels; see conv/conv_columns.h and the two gradients'.
#include "conv/conv_columns.h"
#include "conv/conv_columns_dgrad.h"
#include "conv/conv_columns_wgrad.h"
#include "conv/conv_cpu.h"

namespace weft::WEFT_TARGET {

void conv_columns_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                         const void* bias, void* dst, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = transposed ? dgrad_columns<T> : fprop_columns<T>;
    run(p, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias),
        static_cast<T*>(dst), context);
  });
}

void conv_columns_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                        const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    wgrad_columns(p, static_cast<const T*>(x), static_cast<const T*>(gy), static_cast<T*>(gw),
                  context);
  });
}

}  // namespace weft::WEFT_TARGET
