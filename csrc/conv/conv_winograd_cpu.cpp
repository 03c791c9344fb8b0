// Stride-1 3x3 windows by Winograd's tiles; see conv/conv_winograd.h and conv_winograd_wgrad.h.
//
// What is not finite spreads over its tiles, and where it came from cannot be told from the sums:
// what has such sums goes the direct way.
#include "conv/conv_cpu.h"
#include "conv/conv_winograd.h"
#include "conv/conv_winograd_wgrad.h"

namespace weft::WEFT_TARGET {

void conv_winograd_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                          const void* bias, void* dst, const Context& context) {
  const Gather g = transposed ? dgrad_gather(p) : fprop_gather(p);
  const auto* const from = static_cast<const float*>(src);
  auto* const to = static_cast<float*>(dst);
  Scratch<uint8_t> failed(p.n);
  fill(failed.data(), p.n, uint8_t{0});
  gather_winograd(p, g, from, static_cast<const float*>(w), static_cast<const float*>(bias), to,
                  failed.data(), context);
  ConvProblem again = p;
  for (int64_t n = 0; n < p.n; n += again.n + 1) {
    again.n = 0;
    while (n + again.n < p.n && failed[n + again.n]) ++again.n;
    if (again.n > 0)
      conv_product_gather(again, transposed,
                          from + n * p.groups * g.src_channels * g.src_positions(), w, bias,
                          to + n * p.groups * g.dst_channels * g.dst_positions(), context);
  }
}

void conv_winograd_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                         const Context& context) {
  const bool planes = !p.channels_last;
  Scratch<float> last(planes ? p.weight_elements() : 0);
  auto* const to = static_cast<float*>(gw);
  if (!wgrad_winograd(p, static_cast<const float*>(x), static_cast<const float*>(gy),
                      planes ? last.data() : to, context))
    return conv_product_wgrad(p, x, gy, gw, context);
  if (planes) transpose(last.data(), p.out_channels(), p.window_elements(), p.c, to, context);
}

}  // namespace weft::WEFT_TARGET
