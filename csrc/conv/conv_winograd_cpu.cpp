// Stride-1 3x3 windows by Winograd's tiles; see conv/conv_winograd.h.
#include "conv/conv_cpu.h"
#include "conv/conv_winograd.h"

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
  // A value that is not finite spreads over its tiles, and where it came from cannot be told from
  // the sums: such an image goes the direct way.
  ConvProblem image = p;
  image.n = 1;
  for (int64_t n = 0; n < p.n; ++n)
    if (failed[n])
      conv_product_gather(image, transposed,
                          from + n * p.groups * g.src_channels * g.src_positions(), w, bias,
                          to + n * p.groups * g.dst_channels * g.dst_positions(), context);
}

}  // namespace weft::WEFT_TARGET
