// What the op files of convolution share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "conv/conv_plan.h"

namespace weft {

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

}  // namespace weft
