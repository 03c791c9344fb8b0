// Depthwise convolution; see conv/conv_rows.h, of stride 2 conv/conv_pairs.h and, channels-last,
// conv/conv_depthwise.h.
#include "conv/conv_cpu.h"
#include "conv/conv_depthwise_backward.h"
#include "conv/conv_rows_backward.h"
#if defined(__AVX512F__)
#include "conv/conv_pairs_backward.h"
#include "conv/conv_short_rows.h"
#endif

namespace weft::WEFT_TARGET {

void conv_depthwise_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                           const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto *from = static_cast<const T*>(src), *weights = static_cast<const T*>(w),
               *start = static_cast<const T*>(bias);
    auto* const to = static_cast<T*>(dst);
#if defined(__AVX512F__)
    if (!transposed && goes_in_pairs(p)) return gather_pairs(p, from, weights, start, to, context);
    if (!transposed && has_short_rows(p))
      return gather_short_rows(p, from, weights, start, to, context);
#endif
    const auto run = p.channels_last ? depthwise_gather<T> : gather_rows<T>;
    run(p, g, from, weights, start, to, context);
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
#if defined(__AVX512F__)
    if (goes_in_pairs(p)) return backward_walk<T, PairBackward<T>>(p, t, context);
#endif
    const auto run = p.channels_last ? backward_pixels<T> : backward_walk<T, RowBackward<T>>;
    run(p, t, context);
  });
}

}  // namespace weft::WEFT_TARGET
