// The forward convolution on Hopper, by warpgroup products and box copies.
//
// A block makes a tile of 128 positions x 64 to 256 output channels (conv_wgmma_tile.h); tiles of
// the same positions follow each other, so that the map is read from the second-level cache.
// Weights lie [k][place][c], along the reduction.
//
// Bound: FLOPs of the tensor cores; a step of a tile of 256 columns multiplies 85 numbers for each
// one that it copies. Compiled for sm_90a and run on the host; not measured on a GPU yet, so it
// runs where Context::sm90a asks for it.
#include "conv/conv_wgmma_tile.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T, int kColumns>
WEFT_GLOBAL WEFT_HOT void conv_wgmma_fprop(WEFT_CONSTANT TensorMap x, WEFT_CONSTANT TensorMap w,
                                           Walk walk, Epilogue epilogue, const T* bias, T* y) {
  make_tile<T, Major::reduction, kColumns>(static_cast<unsigned>(device::block_index()), x, w, walk,
                                           epilogue, bias, y, [](int64_t row) { return row; });
}

}  // namespace

bool launch_wgmma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                        void* y, const Context& context) {
  const bool aligned = begins_pack(x) && begins_pack(w) && begins_pack(y);
  const ConvWgmmaPlan plan = plan_here(p, ConvProduct::fprop, aligned, context);
  if (!plan.fits) return false;
  const ConvWindows windows = conv_windows(p);
  dispatch_wgmma(p, plan, [&](auto element, auto columns) {
    using T = decltype(element);
    device::launch({"conv_fprop_wgmma", plan.blocks(), kThreads,
                    conv_wgmma::shared_bytes(plan.columns), context.stream},
                   conv_wgmma_fprop<T, columns.value>, map_of(p, plan, windows, kRows, x),
                   weights_of(p, plan.columns, w), walk_of(p, plan, windows),
                   Epilogue{p.activation, static_cast<float>(p.slope)}, static_cast<const T*>(bias),
                   static_cast<T*>(y));
  });
  return true;
}

}  // namespace weft::WEFT_TARGET
