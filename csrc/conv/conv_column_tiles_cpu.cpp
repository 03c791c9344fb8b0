// Contiguous float32 of few input channels by tiles of outputs; see conv/conv_column_tiles.h.
#include "conv/conv_column_tiles.h"
#include "conv/conv_cpu.h"
#include "conv/conv_failed_images.h"

namespace weft::WEFT_TARGET {

void conv_column_tiles_gather(const ConvProblem& p, bool transposed, const void* src, const void* w,
                              const void* bias, void* dst, const Context& context) {
  const auto* const x = static_cast<const float*>(src);
  auto* const y = static_cast<float*>(dst);
  FailedImages failed(p);
  fprop_column_tiles(p, x, static_cast<const float*>(w), static_cast<const float*>(bias), y,
                     failed.flags(), context);
  failed.for_each_run([&](const ConvProblem& images, int64_t first) {
    conv_columns_gather(images, transposed, x + first * p.in_channels() * p.in_positions(), w, bias,
                        y + first * p.out_channels() * p.out_positions(), context);
  });
}

}  // namespace weft::WEFT_TARGET
