// Convolution on CPU: which kernel a problem takes.
//
// fprop and dgrad are a tile product of pixels (conv_product.h), which reads and writes both
// layouts; wgrad goes pixel by pixel (conv_pixels_wgrad.h), contiguous tensors by way of copies
// (conv_layout_wgrad.h). Contiguous ones of few channels stay flat planes (conv_planes.h).
// Depthwise ones have kernels of their own: conv_rows.h and, channels-last, conv_depthwise.h.
#include "conv/conv_cpu.h"
#include "conv/conv_bias_grad.h"

namespace weft::WEFT_TARGET {
namespace {

// Contiguous tensors without a channel that a vector would run along.
bool is_depthwise(const ConvProblem& p) {
  return p.c == 1 && p.k == 1 && (p.groups > 1 || !p.channels_last);
}

// Whether a side of so many channels fills vectors of the accumulation type.
bool fills_vectors(const ConvProblem& p, int64_t channels) {
  return channels >= (p.dtype == DType::f64 ? kLanes<double> : kLanes<float>);
}

ConvGather* gather_of(const ConvProblem& p, int64_t dst_channels) {
  if (is_depthwise(p)) return conv_depthwise_gather;
  return p.channels_last || fills_vectors(p, dst_channels) ? conv_product_gather
                                                           : conv_planes_gather;
}

void launch_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  const Context& context) {
  gather_of(p, p.k)(p, false, x, w, bias, y, context);
}

void launch_dgrad(const ConvProblem& p, const void* gy, const void* w, const void* bias, void* gx,
                  const Context& context) {
  gather_of(p, p.c)(p, true, gy, w, bias, gx, context);
}

void launch_wgrad(const ConvProblem& p, const void* x, const void* gy, void* gw,
                  const Context& context) {
  ConvWgrad* const run = is_depthwise(p) ? conv_depthwise_wgrad
                         : p.channels_last || fills_vectors(p, most(p.c, p.k)) ? conv_product_wgrad
                                                                               : conv_planes_wgrad;
  run(p, x, gy, gw, context);
}

void launch_bias_grad(const ConvProblem& p, const void* gy, void* gb, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = p.channels_last ? bias_grad_pixels<T> : bias_grad_planes<T>;
    run(p, static_cast<const T*>(gy), static_cast<T*>(gb), context);
  });
}

}  // namespace

const ConvKernels conv_kernels = {launch_fprop, launch_dgrad, launch_wgrad, launch_bias_grad};

}  // namespace weft::WEFT_TARGET
