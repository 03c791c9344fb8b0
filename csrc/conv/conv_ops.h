// What the op files of convolution share.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "conv/conv_plan.h"

namespace weft {

Activation activation_of(c10::string_view name, double slope);

// True where plans are asked for: what would run is noted, and nothing need run.
bool conv_planned(const ConvProblem& p, ConvStep step);

// What an op is asked for, checked; operands are contiguous in the layout that the problem says.
struct ConvRequest {
  ConvProblem problem;
  at::Tensor x, w, bias;  // bias may be undefined
  at::MemoryFormat format;
  std::vector<int64_t> output_size;

  const void* bias_data() const { return bias.defined() ? bias.const_data_ptr() : nullptr; }
};
ConvRequest conv_request(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, c10::string_view activation,
                         double slope, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups);
at::Tensor run_conv(const ConvRequest& request);

// The ops of the same names.
at::Tensor conv(const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);
at::Tensor conv_activated(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, c10::string_view activation,
                          double slope, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation, int64_t groups);
at::Tensor conv_dgrad(const at::Tensor& grad, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias, at::IntArrayRef input_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups);
at::Tensor conv_wgrad(const at::Tensor& input, const at::Tensor& grad, at::IntArrayRef weight_size,
                      at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                      int64_t groups);
at::Tensor conv_bias_grad(const at::Tensor& grad);
// All gradients, of which that of a bias is empty where there is none; `output` is expected where
// there is an activation, which is undone.
std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& input, const at::Tensor& grad, const at::Tensor& weight,
    const std::optional<at::Tensor>& output, c10::string_view activation, double slope, bool bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

// The bias's gradient; a convolution of no channels makes none, and leaves its bias alone.
at::Tensor conv_bias_gradient(const at::Tensor& grad, at::IntArrayRef weight_size);
// The gradient of the sum that the activation made `output` of.
at::Tensor conv_sum_gradient(const at::Tensor& grad, const at::Tensor& output,
                             c10::string_view activation, double slope);

// Their eager paths (eager.h), as a table of Python functions.
PyMethodDef* eager_convolution();

}  // namespace weft
