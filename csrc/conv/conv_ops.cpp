// Convolution ops: check the arguments, complete them into a ConvProblem, allocate, run the kernel.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "conv/conv_ops.h"
#include "ops_common.h"

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

struct ConvArguments {
  IntArrayRef stride;
  // One int per axis; or all leading ones, then all trailing ones. A negative trailing one leaves
  // positions of the input unread.
  IntArrayRef padding;
  IntArrayRef dilation;
  int64_t groups;
};

// The spatial rank is the number of strides: 1, 2 or 3.
int rank_of(IntArrayRef stride) {
  const auto rank = static_cast<int>(stride.size());
  TORCH_CHECK(rank >= 1 && rank <= 3, "conv: stride must have 1, 2 or 3 ints, got ", rank);
  return rank;
}

const char* name_of(int rank) {
  constexpr const char* kNames[] = {"conv1d", "conv2d", "conv3d"};
  return kNames[rank - 1];
}

void check_windows(const ConvArguments& a, int rank) {
  const char* op = name_of(rank);
  const auto count = static_cast<size_t>(rank);
  TORCH_CHECK(a.padding.size() == count || a.padding.size() == 2 * count, op,
              ": expected padding to be a single integer value or a list of ", rank,
              " values to match the convolution dimensions, but got padding=", a.padding);
  TORCH_CHECK(a.dilation.size() == count, op,
              ": expected dilation to be a single integer value or a list of ", rank,
              " values to match the convolution dimensions, but got dilation=", a.dilation);
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  for (int64_t stride : a.stride)
    TORCH_CHECK(stride > 0, op,
                ": non-positive stride is not supported, but got stride=", a.stride);
  for (int64_t padding : a.padding.slice(0, count))
    TORCH_CHECK(padding >= 0, op,
                ": negative padding is not supported, but got padding=", a.padding);
  for (int64_t dilation : a.dilation)
    TORCH_CHECK(dilation > 0, op,
                ": non-positive dilation is not supported: dilation should be greater than zero, "
                "but got dilation=",
                a.dilation);
  for (IntArrayRef values : {a.stride, a.padding, a.dilation})
    for (int64_t value : values)
      TORCH_CHECK(value <= kLimit, op,
                  ": integer out of range: stride, padding and dilation must "
                  "be less than 2^31, but got ",
                  values);
  TORCH_CHECK(a.groups > 0, op,
              ": non-positive groups is not supported, but got groups=", a.groups);
}

// "(5 x 7)"
std::string extents_text(const int64_t (&extents)[3], int rank) {
  std::string text = "(";
  for (int axis = 3 - rank; axis < 3; ++axis)
    text += (axis > 3 - rank ? " x " : "") + std::to_string(extents[axis]);
  return text + ")";
}

// Fills everything but dtype and layout. Sizes are [N, G·C, ...] and [G·K, C, ...]. As in torch, a
// batch of none may have empty maps, and a convolution of no channels makes none.
ConvProblem problem_for(IntArrayRef input, IntArrayRef weight, const ConvArguments& a) {
  const int rank = rank_of(a.stride);
  const char* op = name_of(rank);
  check_windows(a, rank);
  const auto dims = static_cast<size_t>(rank + 2);
  TORCH_CHECK(weight.size() == dims, op, ": expected weight to be ", dims,
              "-dimensional, but got weight of size ", weight);
  TORCH_CHECK(input.size() == dims, op, ": expected input to be ", dims,
              "-dimensional for a weight of size ", weight, ", but got input of size ", input);
  TORCH_CHECK(weight[0] >= a.groups, op, ": Given groups=", a.groups,
              ", expected weight to be at least ", a.groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(weight[0] % a.groups == 0, op, ": Given groups=", a.groups,
              ", expected weight to be divisible by ", a.groups,
              " at dimension 0, but got weight of size ", weight, " instead");
  TORCH_CHECK(input[1] == weight[1] * a.groups, op, ": Given groups=", a.groups,
              ", weight of size ", weight, ", expected input", input, " to have ",
              weight[1] * a.groups, " channels, but got ", input[1], " channels instead");
  ConvProblem p;
  p.n = input[0];
  p.groups = a.groups;
  p.c = weight[1];
  p.k = weight[0] / a.groups;
  int64_t padded[3] = {1, 1, 1};
  int64_t sizes[3] = {1, 1, 1};
  int64_t window_elements = 1;
  bool fits = true;
  for (int i = 0; i < rank; ++i) {
    const int axis = 3 - rank + i;
    Window& w = p.window[axis];
    w.size = sizes[axis] = weight[2 + i];
    w.stride = a.stride[i];
    w.padding = a.padding[i];
    w.dilation = a.dilation[i];
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(w.size > 0 || p.c == 0, op,
                ": kernel size should be greater than zero, but got weight of size ", weight);
    TORCH_CHECK(
        w.size <= kLimit / w.dilation && window_elements <= kLimit / std::max<int64_t>(w.size, 1),
        op, ": integer out of range: a window of weight ", weight, " with dilation ", a.dilation,
        " must span less than 2^31 positions");
    window_elements *= w.size;
    p.in[axis] = input[2 + i];
    padded[axis] = p.in[axis] + w.padding + a.padding[a.padding.size() - rank + i];
    fits = fits && padded[axis] >= w.span();
    p.out[axis] = (padded[axis] - w.span()) / w.stride + 1;
  }
  TORCH_CHECK(fits, op, ": Calculated padded input size per channel: ", extents_text(padded, rank),
              ". Kernel size: ", extents_text(sizes, rank),
              ". Kernel size can't be greater than actual input size (dilation=", a.dilation, ")");
  TORCH_CHECK(
      p.in_positions() > 0 || p.n == 0 || p.c == 0, op,
      ": Only zero batch or zero channel inputs are supported, but got input shape: ", input);
  return p;
}

void check_pair(const Tensor& t, const Tensor& reference, const char* op, const char* argument,
                const char* reference_argument) {
  TORCH_CHECK(t.scalar_type() == reference.scalar_type(), op, ": ", reference_argument, " type (",
              toString(reference.scalar_type()), ") and ", argument, " type (",
              toString(t.scalar_type()), ") should be the same");
  check_same(t, reference, op, argument);
}

void check_bias(const Tensor& bias, const Tensor& input, const Tensor& weight, int64_t channels,
                const char* op) {
  check_pair(bias, input, op, "bias", "Input");
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == channels, op, ": Given weight of size ",
              weight.sizes(), ", expected bias to be 1-dimensional with ", channels,
              " elements, but got bias of size ", bias.sizes(), " instead");
}

// Whether torch lets convolutions of float32 round their products: its switch for cuDNN, which CUDA
// tensors obey, and host execution of their kernels.
bool allows_tf32() { return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV); }

// channels-last where either operand is, as torch decides.
at::MemoryFormat common_layout(const Tensor& a, const Tensor& b) {
  const auto format = layout_of(a);
  return format == at::MemoryFormat::Contiguous ? layout_of(b) : format;
}

std::vector<int64_t> output_size(const ConvProblem& p, int rank) {
  std::vector<int64_t> size = {p.n, p.c == 0 ? 0 : p.out_channels()};
  size.insert(size.end(), p.out + 3 - rank, p.out + 3);
  return size;
}

void check_grad_size(const Tensor& grad, const ConvProblem& p, int rank) {
  TORCH_CHECK(grad.sizes() == IntArrayRef(output_size(p, rank)), name_of(rank),
              ": grad must have the output's size ", output_size(p, rank), ", got ", grad.sizes());
}

}  // namespace

Activation activation_of(c10::string_view name, double slope) {
  constexpr std::pair<c10::string_view, Activation> kNames[] = {
      {"none", Activation::none},
      {"relu", Activation::relu},
      {"leaky_relu", Activation::leaky_relu},
      {"tanh", Activation::tanh},
      {"sigmoid", Activation::sigmoid},
  };
  TORCH_CHECK_VALUE(slope >= 0, "conv_activated: expected a slope of at least 0, got ", slope);
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  TORCH_CHECK_VALUE(false,
                    "conv_activated: expected activation to be one of none, relu, "
                    "leaky_relu, tanh and sigmoid, got ",
                    name);
}

namespace {}  // namespace

ConvRequest conv_request(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, c10::string_view activation,
                         double slope, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, int64_t groups) {
  ConvRequest r;
  ConvProblem& p = r.problem;
  p = problem_for(input.sizes(), weight.sizes(), {stride, padding, dilation, groups});
  const int rank = rank_of(stride);
  const char* op = name_of(rank);
  check_pair(weight, input, op, "weight", "Input");
  p.dtype = dtype_of(input, op, "input");
  p.tf32 = allows_tf32();
  if (bias) check_bias(*bias, input, weight, p.out_channels(), op);
  p.activation = activation_of(activation, slope);
  p.slope = slope;
  r.format = common_layout(input, weight);
  p.channels_last = r.format != at::MemoryFormat::Contiguous;
  const c10::DeviceGuard guard(input.device());
  r.x = input.contiguous(r.format);
  r.w = weight.contiguous(r.format);
  if (bias) r.bias = bias->contiguous();
  r.output_size = output_size(p, rank);
  return r;
}

Tensor run_conv(const ConvRequest& r) {
  const auto& kernels = kernels_for(r.x, conv_kernels_for);
  const c10::DeviceGuard guard(r.x.device());
  Tensor y = empty_output(r.x, r.output_size, r.format);
  if (y.numel() > 0 && !conv_planned(r.problem, ConvStep::fprop))
    kernels.fprop(r.problem, r.x.const_data_ptr(), r.w.const_data_ptr(), r.bias_data(),
                  y.mutable_data_ptr(), context_for(r.x));
  return y;
}

Tensor conv_activated(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      c10::string_view activation, double slope, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return run_conv(
      conv_request(input, weight, bias, activation, slope, stride, padding, dilation, groups));
}

Tensor conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return conv_activated(input, weight, bias, "none", 0, stride, padding, dilation, groups);
}

Tensor conv_dgrad(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& bias,
                  IntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                  IntArrayRef dilation, int64_t groups) {
  ConvProblem p = problem_for(input_size, weight.sizes(), {stride, padding, dilation, groups});
  const int rank = rank_of(stride);
  check_grad_size(grad, p, rank);
  check_pair(weight, grad, name_of(rank), "weight", "grad");
  p.dtype = dtype_of(grad, name_of(rank), "grad");
  p.tf32 = allows_tf32();
  if (bias) check_bias(*bias, grad, weight, p.in_channels(), name_of(rank));
  const auto& kernels = kernels_for(grad, conv_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const auto format = common_layout(grad, weight);
  p.channels_last = format != at::MemoryFormat::Contiguous;
  const Tensor gy = grad.contiguous(format);
  const Tensor w = weight.contiguous(format);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  Tensor gx = empty_output(gy, input_size, format);
  if (p.in_elements() > 0 && !conv_planned(p, ConvStep::dgrad))
    kernels.dgrad(p, gy.const_data_ptr(), w.const_data_ptr(), bias ? b.const_data_ptr() : nullptr,
                  gx.mutable_data_ptr(), context_for(gy));
  return gx;
}

Tensor conv_wgrad(const Tensor& input, const Tensor& grad, IntArrayRef weight_size,
                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  ConvProblem p = problem_for(input.sizes(), weight_size, {stride, padding, dilation, groups});
  const int rank = rank_of(stride);
  check_grad_size(grad, p, rank);
  check_pair(grad, input, name_of(rank), "grad", "Input");
  p.dtype = dtype_of(input, name_of(rank), "input");
  p.tf32 = allows_tf32();
  const auto& kernels = kernels_for(input, conv_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const auto format = common_layout(input, grad);
  p.channels_last = format != at::MemoryFormat::Contiguous;
  const Tensor x = input.contiguous(format);
  const Tensor gy = grad.contiguous(format);
  Tensor gw = empty_output(x, weight_size, format);
  if (p.weight_elements() == 0 || conv_planned(p, ConvStep::wgrad)) return gw;
  Context context = context_for(x);
  Tensor workspace;
  if (const int64_t bytes = kernels.wgrad_workspace ? kernels.wgrad_workspace(p) : 0; bytes > 0) {
    workspace = empty_output(x, {bytes}, at::kByte);
    context.workspace = workspace.mutable_data_ptr();
  }
  kernels.wgrad(p, x.const_data_ptr(), gy.const_data_ptr(), gw.mutable_data_ptr(), context);
  return gw;
}

Tensor conv_bias_grad(const Tensor& grad) {
  const char* op = "conv_bias_grad";
  TORCH_CHECK(grad.dim() >= 3 && grad.dim() <= 5, op,
              ": expected grad to have 3, 4 or 5 dimensions, but got ", grad.sizes());
  ConvProblem p;
  p.dtype = dtype_of(grad, op, "grad");
  p.n = grad.size(0);
  p.k = grad.size(1);
  for (int64_t i = 2; i < grad.dim(); ++i) p.out[3 - grad.dim() + i] = grad.size(i);
  const auto& kernels = kernels_for(grad, conv_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const auto format = layout_of(grad);
  p.channels_last = format != at::MemoryFormat::Contiguous;
  const Tensor gy = grad.contiguous(format);
  Tensor gb = empty_output(gy, {p.k});
  if (p.k > 0 && !conv_planned(p, ConvStep::bias_grad))
    kernels.bias_grad(p, gy.const_data_ptr(), gb.mutable_data_ptr(), context_for(gy));
  return gb;
}

Tensor conv_bias_gradient(const Tensor& grad, IntArrayRef weight_size) {
  return weight_size[1] > 0 ? conv_bias_grad(grad) : grad.new_zeros({weight_size[0]});
}

Tensor conv_sum_gradient(const Tensor& grad, const Tensor& output, c10::string_view activation,
                         double slope) {
  switch (activation_of(activation, slope)) {
    case Activation::relu:
      return at::threshold_backward(grad, output, 0);
    case Activation::leaky_relu:
      return at::leaky_relu_backward(grad, output, slope, /*self_is_result=*/true);
    case Activation::tanh:
      return at::tanh_backward(grad, output);
    case Activation::sigmoid:
      return at::sigmoid_backward(grad, output);
    case Activation::none:
      break;
  }
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& input, const Tensor& grad,
                                                 const Tensor& weight,
                                                 const std::optional<Tensor>& output,
                                                 c10::string_view activation, double slope,
                                                 bool bias, IntArrayRef stride, IntArrayRef padding,
                                                 IntArrayRef dilation, int64_t groups) {
  ConvProblem p = problem_for(input.sizes(), weight.sizes(), {stride, padding, dilation, groups});
  const int rank = rank_of(stride);
  const char* op = name_of(rank);
  check_grad_size(grad, p, rank);
  check_pair(grad, input, op, "grad", "Input");
  check_pair(weight, input, op, "weight", "Input");
  p.dtype = dtype_of(input, op, "input");
  p.activation = activation_of(activation, slope);
  p.slope = slope;
  TORCH_CHECK(output.has_value() == (p.activation != Activation::none), op,
              ": output is expected where there is an activation, and only there");
  if (output) {
    check_grad_size(*output, p, rank);
    check_pair(*output, input, op, "output", "Input");
  }
  const auto& kernels = kernels_for(input, conv_kernels_for);
  const auto format = common_layout(grad, weight);
  p.channels_last = format != at::MemoryFormat::Contiguous;
  const Target target = planning() ? planned_target() : target_for(input);
  if (!is_cpu(target) || !conv_fuses_backward(p, conv_lanes(target, p.dtype)) ||
      p.in_elements() == 0 || p.out_elements() == 0 || format != common_layout(input, grad)) {
    Tensor gy = grad, gb = at::empty({0}, grad.options());
    if (output && kernels.undo && !planning() && p.out_elements() > 0) {
      p.channels_last = layout_of(grad) != at::MemoryFormat::Contiguous;
      const Tensor from = grad.contiguous(layout_of(grad)), y = output->contiguous(layout_of(grad));
      gy = empty_output(from, grad.sizes(), layout_of(grad));
      if (bias) gb = empty_output(gy, {p.out_channels()});
      kernels.undo(p, from.const_data_ptr(), y.const_data_ptr(), gy.mutable_data_ptr(),
                   bias ? gb.mutable_data_ptr() : nullptr, context_for(gy));
    } else {
      if (output) gy = conv_sum_gradient(grad, *output, activation, slope);
      if (bias) gb = conv_bias_gradient(gy, weight.sizes());
    }
    Tensor gx =
        conv_dgrad(gy, weight, std::nullopt, input.sizes(), stride, padding, dilation, groups);
    Tensor gw = conv_wgrad(input, gy, weight.sizes(), stride, padding, dilation, groups);
    return {gx, gw, gb};
  }
  const Tensor x = input.contiguous(format), gy = grad.contiguous(format);
  const Tensor w = weight.contiguous(format);
  const Tensor y = output ? output->contiguous(format) : Tensor();
  Tensor gx = empty_output(gy, input.sizes(), format);
  Tensor gw = empty_output(x, weight.sizes(), format);
  Tensor gb = empty_output(gy, {bias ? p.out_channels() : 0});
  if (conv_planned(p, ConvStep::backward)) return {gx, gw, gb};
  kernels.backward(p,
                   {x.const_data_ptr(), gy.const_data_ptr(), w.const_data_ptr(),
                    output ? y.const_data_ptr() : nullptr, gx.mutable_data_ptr(),
                    gw.mutable_data_ptr(), bias ? gb.mutable_data_ptr() : nullptr},
                   context_for(x));
  return {gx, gw, gb};
}

namespace {

void implement(torch::Library& m) {
  m.impl("conv", conv);
  m.impl("conv_activated", conv_activated);
  m.impl("conv_dgrad", conv_dgrad);
  m.impl("conv_wgrad", conv_wgrad);
  m.impl("conv_bias_grad", conv_bias_grad);
  m.impl("conv_backward", conv_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "conv(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  m.def(
      "conv_activated(Tensor input, Tensor weight, Tensor? bias, str activation, float slope, "
      "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "conv_dgrad(Tensor grad, Tensor weight, Tensor? bias, SymInt[] input_size, int[] stride, "
      "int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  m.def(
      "conv_wgrad(Tensor input, Tensor grad, SymInt[] weight_size, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  m.def("conv_bias_grad(Tensor grad) -> Tensor");
  m.def(
      "conv_backward(Tensor input, Tensor grad, Tensor weight, Tensor? output, str activation, "
      "float slope, bool bias, int[] stride, int[] padding, int[] dilation, int groups) -> "
      "(Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
