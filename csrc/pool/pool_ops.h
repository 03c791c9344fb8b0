// The pooling ops, as the dispatcher and the eager path (pool_eager_ops.cpp) run them: arguments
// are completed into a request, and a request is run on tensors.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <ostream>
#include <tuple>
#include <vector>

#include "pool/pool.h"

namespace weft {

// The op as the user called it: max_pool of rank 2 is max_pool2d.
struct OpName {
  const char* stem;
  int rank;
  const char* suffix = "";
};

inline std::ostream& operator<<(std::ostream& out, const OpName& name) {
  return out << name.stem << name.rank << 'd' << name.suffix;
}

// A problem, the sizes of its tensors as torch has them, and who asked.
struct PoolRequest {
  OpName op{};
  PoolProblem problem;
  std::vector<int64_t> input_sizes;
  std::vector<int64_t> output_sizes;
};

// ---- requests: all but dtype and layout is filled; `sizes` are the input's, batched or not ------

// One int for all axes, or one per axis; an empty stride is the kernel size.
struct PoolArguments {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

void check_pool_dims(at::IntArrayRef sizes, const OpName& op);
// The last `axes` sizes may not be empty.
void check_not_empty(at::IntArrayRef sizes, int axes, const OpName& op);

PoolRequest max_windows(at::IntArrayRef sizes, const PoolArguments& arguments, const OpName& op);
PoolRequest avg_windows(at::IntArrayRef sizes, const PoolArguments& arguments,
                        bool count_include_pad, std::optional<int64_t> divisor_override,
                        const OpName& op);
PoolRequest adaptive_windows(at::IntArrayRef sizes, at::IntArrayRef output_size, const OpName& op);
// As `adaptive_windows`, of the maximum forward, which takes no empty channels.
PoolRequest adaptive_max_windows(at::IntArrayRef sizes, at::IntArrayRef output_size,
                                 const OpName& op);

// ---- running them ------------------------------------------------------------------------------

// True if gradients of an input like `t` are channels-last.
bool is_channels_last(const at::Tensor& t, int rank);

// (output, places); without `keep_places` the places are empty.
std::tuple<at::Tensor, at::Tensor> max_of(PoolRequest request, const at::Tensor& input,
                                          bool keep_places);
at::Tensor max_gradient(PoolRequest request, const at::Tensor& grad, const at::Tensor& places,
                        bool channels_last);
at::Tensor mean_of(PoolRequest request, const at::Tensor& input);
at::Tensor mean_gradient(PoolRequest request, const at::Tensor& grad, bool channels_last);

// The eager paths, by the names of the functions.
PyMethodDef* eager_pooling();

}  // namespace weft
