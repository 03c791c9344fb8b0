// The arguments of pooling: checked as torch checks them, and completed into a request.
#include "pool/pool_ops.h"

#include <c10/util/Exception.h>

#include <limits>

namespace weft {
namespace {

using at::IntArrayRef;

// A window argument as torch takes it: one number for all axes, or one per axis; for `stride`, none
// means the kernel size.
int64_t axis_value(IntArrayRef values, int axis, const OpName& op, const char* argument) {
  const auto count = static_cast<int>(values.size());
  TORCH_CHECK(count == 1 || count == op.rank, op, ": ", argument,
              " must either be a single int, or a tuple of ", op.rank, " ints; got ", count);
  return count == 1 ? values[0] : values[axis];
}

int64_t output_extent(int64_t input, const Window& w, bool ceil_mode) {
  const int64_t range = input + 2 * w.padding - w.span() + (ceil_mode ? w.stride - 1 : 0);
  int64_t output = range >= 0 ? range / w.stride + 1 : 0;
  // With ceil_mode the last window must start inside the input or the leading padding.
  if (ceil_mode && (output - 1) * w.stride >= input + w.padding) --output;
  return output;
}

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

// Neighbouring axes that one window covers whole are one axis: D, H, W -> 1, D, H*W. Places and
// indices count the same elements in the same order.
void merge_global_axes(PoolProblem& p) {
  for (int merges = 0; merges < 2 && p.out[1] == 1 && p.out[2] == 1; ++merges) {
    p.in[2] *= p.in[1];
    p.in[1] = p.in[0];
    p.out[1] = p.out[0];
    p.in[0] = p.out[0] = 1;
  }
}

}  // namespace

void check_pool_dims(IntArrayRef sizes, const OpName& op) {
  const auto dims = static_cast<int>(sizes.size());
  TORCH_CHECK(dims == op.rank + 1 || dims == op.rank + 2, op, ": Expected ", op.rank + 1, "D or ",
              op.rank + 2, "D (batch mode) tensor, but got input of size ", sizes);
}

void check_not_empty(IntArrayRef sizes, int axes, const OpName& op) {
  const auto dims = static_cast<int>(sizes.size());
  for (int i = dims - axes; i < dims; ++i)
    TORCH_CHECK(sizes[i] > 0, op,
                ": Expected input to have non-zero size for non-batch dimensions, but got ", sizes,
                " with dimension ", i, " being empty");
}

PoolRequest max_windows(IntArrayRef sizes, const PoolArguments& a, const OpName& op) {
  check_pool_dims(sizes, op);
  const int rank = op.rank;
  const auto dims = static_cast<int>(sizes.size());
  PoolRequest request{op, {}, sizes.vec(), sizes.vec()};
  PoolProblem& p = request.problem;
  int64_t window_elements = 1;
  for (int i = 0; i < rank; ++i) {
    const int axis = 3 - rank + i;
    Window& w = p.window[axis];
    w.size = axis_value(a.kernel_size, i, op, "kernel_size");
    w.stride = a.stride.empty() ? w.size : axis_value(a.stride, i, op, "stride");
    w.padding = axis_value(a.padding, i, op, "padding");
    w.dilation = axis_value(a.dilation, i, op, "dilation");
    TORCH_CHECK(w.size > 0, op, ": kernel size should be greater than zero, but got ",
                a.kernel_size);
    TORCH_CHECK(w.stride > 0, op, ": stride should be greater than zero, but got ", a.stride);
    TORCH_CHECK(w.dilation > 0, op,
                ": dilation should be greater than zero, but got dilation: ", a.dilation);
    TORCH_CHECK(w.padding >= 0, op, ": pad must be non-negative, but got pad: ", w.padding);
    TORCH_CHECK(w.padding <= w.size / 2, op,
                ": pad should be at most half of effective kernel size, but got pad=", w.padding,
                ", kernel_size=", w.size, " and dilation=", w.dilation);
    TORCH_CHECK(w.size <= kLimit && w.stride <= kLimit && w.dilation <= kLimit &&
                    w.dilation <= kLimit / w.size,
                op, ": integer out of range: kernel_size=", w.size, " stride=", w.stride,
                " dilation=", w.dilation, " must span less than 2^31 positions");
    TORCH_CHECK(window_elements <= kLimit / w.size, op, ": integer out of range: a window of ",
                a.kernel_size, " has more than 2^31 - 1 elements");
    window_elements *= w.size;
    p.in[axis] = sizes[dims - rank + i];
    p.out[axis] = output_extent(p.in[axis], w, a.ceil_mode);
    request.output_sizes[dims - rank + i] = p.out[axis];
  }
  check_not_empty(sizes, rank + 1, op);
  for (int axis = 3 - rank; axis < 3; ++axis)
    TORCH_CHECK(p.out[axis] >= 1, op, ": Given input size: ", sizes,
                ". Calculated output size is too small: axis ", axis - (3 - rank), " gives ",
                p.out[axis], " from ", p.in[axis], " with kernel_size=", p.window[axis].size,
                " padding=", p.window[axis].padding, " dilation=", p.window[axis].dilation);
  return request;
}

PoolRequest avg_windows(IntArrayRef sizes, const PoolArguments& arguments, bool count_include_pad,
                        std::optional<int64_t> divisor_override, const OpName& op) {
  PoolRequest request = max_windows(sizes, arguments, op);
  TORCH_CHECK(divisor_override.value_or(1) != 0, op, ": divisor must be not zero");
  request.problem.divisor = divisor_override.value_or(0);
  request.problem.count_include_pad = count_include_pad;
  return request;
}

PoolRequest adaptive_windows(IntArrayRef sizes, IntArrayRef output_size, const OpName& op) {
  check_pool_dims(sizes, op);
  const int rank = op.rank;
  const auto dims = static_cast<int>(sizes.size());
  check_not_empty(sizes, rank, op);
  PoolRequest request{op, {}, sizes.vec(), sizes.vec()};
  PoolProblem& p = request.problem;
  for (int i = 0; i < rank; ++i) {
    const int64_t extent = output_size[i];
    TORCH_CHECK(extent >= 0 && extent <= kLimit, op,
                ": elements of output_size must be greater than or equal to 0 and less than 2^31,"
                " but got ",
                output_size);
    p.in[3 - rank + i] = sizes[dims - rank + i];
    p.out[3 - rank + i] = extent;
    request.output_sizes[dims - rank + i] = extent;
  }
  merge_global_axes(p);
  int64_t window_elements = 1;
  for (int axis = 0; axis < 3; ++axis) {
    p.window[axis] = adaptive_window(p.in[axis], p.out[axis]);
    TORCH_CHECK(p.in[axis] <= kLimit && window_elements <= kLimit / p.window[axis].size, op,
                ": integer out of range: windows of an input of size ", sizes, " for output_size ",
                output_size, " have more than 2^31 - 1 elements");
    window_elements *= p.window[axis].size;
  }
  return request;
}

PoolRequest adaptive_max_windows(IntArrayRef sizes, IntArrayRef output_size, const OpName& op) {
  check_pool_dims(sizes, op);
  check_not_empty(sizes, op.rank + 1, op);
  return adaptive_windows(sizes, output_size, op);
}

}  // namespace weft
