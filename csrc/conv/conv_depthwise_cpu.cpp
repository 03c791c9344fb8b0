// Depthwise convolution, by the paths of conv_plan.h: see conv/conv_rows.h, conv/conv_pairs.h,
// conv/conv_short_rows.h and, channels-last, conv/conv_depthwise.h.
#include "conv/conv_cpu.h"
#include "conv/conv_depthwise_backward.h"
#include "conv/conv_plan.h"
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
    switch (conv_gather_path(p, transposed, kLanes<T>)) {
#if defined(__AVX512F__)
      case ConvPath::pairs:
        return gather_pairs(p, from, weights, start, to, context);
      case ConvPath::short_rows:
        return gather_short_rows(p, from, weights, start, to, context);
#endif
      case ConvPath::pixels:
        return depthwise_gather(p, g, from, weights, start, to, context);
      default:
        return gather_rows(p, g, from, weights, start, to, context);
    }
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
    switch (conv_backward_path(p, kLanes<T>)) {
#if defined(__AVX512F__)
      case ConvPath::pairs:
        return backward_walk<T, PairBackward<T>>(p, t, context);
#endif
      case ConvPath::pixels:
        return backward_pixels<T>(p, t, context);
      default:
        return backward_walk<T, RowBackward<T>>(p, t, context);
    }
  });
}

}  // namespace weft::WEFT_TARGET
