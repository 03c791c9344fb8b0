// Convolution on CPU: the kernel of the path that conv_plan.h chooses.
//
// fprop and dgrad are a tile product of pixels (conv_product.h), which reads and writes both
// layouts, in float32 and float64 of 3x3 windows one of Winograd's tiles (conv_winograd.h); wgrad
// goes pixel by pixel (conv_pixels_wgrad.h), contiguous tensors by way of copies
// (conv_layout_wgrad.h). Contiguous ones of windows of one place are products along the positions
// (conv_flat.h), whose gradients may come at once (conv_flat_backward.h). Contiguous ones of few
// input channels are copied for each column of the window (conv_columns.h), fprop in float32 with
// fewer products where that pays (conv_column_tiles.h). Others of few channels stay flat planes
// (conv_planes.h), and channels-last ones of very few are copied to such (conv_planes_last.h).
// Depthwise ones have kernels of their own: conv_rows.h and, channels-last, conv_depthwise.h; all
// their gradients at once are conv_rows_backward.h and conv_depthwise_backward.h.
#include "conv/conv_cpu.h"
#include "conv/conv_bias_grad.h"
#include "conv/conv_plan.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr Target kTarget = Target::WEFT_TARGET;
static_assert(conv_lanes(kTarget, DType::f32) == kLanes<float>);

ConvGather* gather_of(const ConvProblem& p, bool transposed) {
  switch (conv_gather_path(p, transposed, conv_lanes(kTarget, p.dtype))) {
    case ConvPath::product:
      return conv_product_gather;
    case ConvPath::planes:
      return conv_planes_gather;
    case ConvPath::winograd:
      return conv_winograd_gather;
    case ConvPath::flat:
      return conv_flat_gather;
    case ConvPath::columns:
      return conv_columns_gather;
    case ConvPath::column_tiles:
      return conv_column_tiles_gather;
    default:
      return conv_depthwise_gather;
  }
}

ConvWgrad* wgrad_of(const ConvProblem& p) {
  switch (conv_wgrad_path(p, conv_lanes(kTarget, p.dtype))) {
    case ConvPath::product:
      return conv_product_wgrad;
    case ConvPath::planes:
      return conv_planes_wgrad;
    case ConvPath::winograd:
      return conv_winograd_wgrad;
    case ConvPath::flat:
      return conv_flat_wgrad;
    case ConvPath::columns:
      return conv_columns_wgrad;
    default:
      return conv_depthwise_wgrad;
  }
}

void launch_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  const Context& context) {
  gather_of(p, false)(p, false, x, w, bias, y, context);
}

void launch_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias, void* gx,
                  const Context& context) {
  gather_of(p, true)(p, true, gy, w, bias, gx, context);
}

void launch_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                  const Context& context) {
  wgrad_of(p)(p, x, gy, gw, context);
}

void launch_undo(const ConvProblem& p, const void* gy, const void* y, void* undone, void* gb,
                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GradientOfSums<T> grad{p, static_cast<const T*>(gy), static_cast<const T*>(y),
                                 static_cast<T*>(undone)};
    const auto run = p.channels_last ? bias_grad_pixels<T> : bias_grad_planes<T>;
    run(grad, static_cast<T*>(gb), context);
  });
}

void launch_bias_grad(const ConvProblem& p, const void* gy, void* gb, const Context& context) {
  launch_undo(p, gy, nullptr, nullptr, gb, context);
}

void launch_backward(const ConvProblem& p, const ConvGradients& t, const Context& context) {
  (conv_is_depthwise(p) ? conv_depthwise_backward : conv_flat_backward)(p, t, context);
}

}  // namespace

const ConvKernels conv_kernels = {launch_fprop, launch_dgrad,    launch_wgrad, launch_bias_grad,
                                  nullptr,      launch_backward, launch_undo};

}  // namespace weft::WEFT_TARGET
