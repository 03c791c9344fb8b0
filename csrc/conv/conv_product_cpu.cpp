// fprop and dgrad as a tile product; see conv/conv_product.h.
#include "conv/conv_cpu.h"
#include "conv/conv_product.h"

namespace weft::WEFT_TARGET {

void conv_product_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                         const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_product(p, g, static_cast<const T*>(src), static_cast<const T*>(w),
                   static_cast<const T*>(bias), static_cast<T*>(dst), context);
  });
}

}  // namespace weft::WEFT_TARGET
