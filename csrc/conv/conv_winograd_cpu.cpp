// Stride-1 3x3 windows by Winograd's tiles; see conv/conv_winograd.h and conv_winograd_wgrad.h.
// Weight gradients with sums that are not finite go the direct way, as such images do.
#include "conv/conv_cpu.h"
#include "conv/conv_failed_images.h"
#include "conv/conv_winograd.h"
#include "conv/conv_winograd_wgrad.h"
#include "core/dispatch_wide.h"

namespace weft::WEFT_TARGET {

void conv_winograd_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                          const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  dispatch_wide(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* const from = static_cast<const T*>(src);
    auto* const to = static_cast<T*>(dst);
    FailedImages failed(p);
    gather_winograd(p, g, from, static_cast<const T*>(w), static_cast<const T*>(bias), to,
                    failed.flags(), context);
    failed.for_each_run([&](const ConvProblem& images, int64_t first) {
      conv_product_gather(images, transposed,
                          from + first * p.groups * g.src_channels * g.src_positions(), w, bias,
                          to + first * p.groups * g.dst_channels * g.dst_positions(), context);
    });
  });
}

void conv_winograd_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                         const Context& context) {
  dispatch_wide(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool planes = !p.channels_last;
    Scratch<T> last(planes ? p.weight_elements() : 0);
    auto* const to = static_cast<T*>(gw);
    if (!wgrad_winograd(p, static_cast<const T*>(x), static_cast<const T*>(gy),
                        planes ? last.data() : to, context))
      return conv_product_wgrad(p, x, gy, gw, context);
    if (planes) transpose(last.data(), p.out_channels(), p.window_elements(), p.c, to, context);
  });
}

}  // namespace weft::WEFT_TARGET
