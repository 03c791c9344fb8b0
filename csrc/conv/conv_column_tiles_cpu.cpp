// Contiguous float32 of few input channels by tiles of outputs; see conv/conv_column_tiles.h.
//
// What is not finite spreads over its tiles; images with such sums go the direct way.
#include "conv/conv_column_tiles.h"
#include "conv/conv_cpu.h"

namespace weft::WEFT_TARGET {

void conv_column_tiles_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                              const void* bias, void* dst, const Context& context) {
  const auto* const x = static_cast<const float*>(src);
  auto* const y = static_cast<float*>(dst);
  Scratch<uint8_t> failed(p.n);
  fill(failed.data(), p.n, uint8_t{0});
  fprop_column_tiles(p, x, static_cast<const float*>(w), static_cast<const float*>(bias), y,
                     failed.data(), context);
  ConvProblem again = p;
  for (int64_t n = 0; n < p.n; n += again.n + 1) {
    again.n = 0;
    while (n + again.n < p.n && failed[n + again.n]) ++again.n;
    if (again.n > 0)
      conv_columns_gather(again, transposed, x + n * p.in_channels() * p.in_positions(), w, bias,
                          y + n * p.out_channels() * p.out_positions(), context);
  }
}

}  // namespace weft::WEFT_TARGET
