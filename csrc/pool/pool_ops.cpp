// Pooling ops: check the arguments, complete them into a PoolProblem, allocate, run the kernel.
#include "ops_common.h"
#include "pool/pool.h"

#include <c10/core/DeviceGuard.h>

#include <limits>
#include <optional>
#include <vector>

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

// A window argument as torch takes it: one number for all axes, or one per axis; for `stride`, none
// means the kernel size.
int64_t axis_value(IntArrayRef values, int axis, int rank, const char* op, const char* argument) {
  const auto count = static_cast<int>(values.size());
  TORCH_CHECK(count == 1 || count == rank, op, ": ", argument,
              " must either be a single int, or a tuple of ", rank, " ints; got ", count);
  return count == 1 ? values[0] : values[axis];
}

int64_t output_extent(int64_t input, const Window& w, bool ceil_mode) {
  const int64_t range = input + 2 * w.padding - w.span();
  int64_t output = (range >= 0 ? (range + (ceil_mode ? w.stride - 1 : 0)) / w.stride : -1) + 1;
  // With ceil_mode the last window must start inside the input or the leading padding.
  if (ceil_mode && (output - 1) * w.stride >= input + w.padding) --output;
  return output;
}

struct PoolArguments {
  IntArrayRef kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

// Fills everything but dtype, layout and divisor; `sizes` are the input's, batched or not.
PoolProblem problem_for(IntArrayRef sizes, const PoolArguments& a, int rank, const char* op) {
  const auto dims = static_cast<int>(sizes.size());
  TORCH_CHECK(dims == rank + 1 || dims == rank + 2, op, ": Expected ", rank + 1, "D or ", rank + 2,
              "D (batch mode) tensor, but got input of size ", sizes);
  PoolProblem p;
  int64_t window_elements = 1;
  for (int i = 0; i < rank; ++i) {
    const int axis = 3 - rank + i;
    Window& w = p.window[axis];
    w.size = axis_value(a.kernel_size, i, rank, op, "kernel_size");
    w.stride = a.stride.empty() ? w.size : axis_value(a.stride, i, rank, op, "stride");
    w.padding = axis_value(a.padding, i, rank, op, "padding");
    w.dilation = axis_value(a.dilation, i, rank, op, "dilation");
    TORCH_CHECK(w.size > 0, op, ": kernel size should be greater than zero, but got ",
                a.kernel_size);
    TORCH_CHECK(w.stride > 0, op, ": stride should be greater than zero, but got ", a.stride);
    TORCH_CHECK(w.dilation > 0, op,
                ": dilation should be greater than zero, but got dilation: ", a.dilation);
    TORCH_CHECK(w.padding >= 0, op, ": pad must be non-negative, but got pad: ", w.padding);
    TORCH_CHECK(w.padding <= w.size / 2, op,
                ": pad should be at most half of effective kernel size, but got pad=", w.padding,
                ", kernel_size=", w.size, " and dilation=", w.dilation);
    constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
    TORCH_CHECK(w.size <= kLimit && w.stride <= kLimit && w.dilation <= kLimit &&
                    w.dilation <= kLimit / w.size,
                op, ": integer out of range: kernel_size=", w.size, " stride=", w.stride,
                " dilation=", w.dilation, " must span less than 2^31 positions");
    TORCH_CHECK(window_elements <= kLimit / w.size, op, ": integer out of range: a window of ",
                a.kernel_size, " has more than 2^31 - 1 elements");
    window_elements *= w.size;
    p.in[axis] = sizes[dims - rank + i];
    p.out[axis] = output_extent(p.in[axis], w, a.ceil_mode);
  }
  for (int i = dims - rank - 1; i < dims; ++i)
    TORCH_CHECK(sizes[i] > 0, op,
                ": Expected input to have non-zero size for non-batch dimensions, but got ", sizes,
                " with dimension ", i, " being empty");
  for (int axis = 3 - rank; axis < 3; ++axis)
    TORCH_CHECK(p.out[axis] >= 1, op, ": Given input size: ", sizes,
                ". Calculated output size is too small: axis ", axis - (3 - rank), " gives ",
                p.out[axis], " from ", p.in[axis], " with kernel_size=", p.window[axis].size,
                " padding=", p.window[axis].padding, " dilation=", p.window[axis].dilation);
  return p;
}

void set_layout(PoolProblem& p, IntArrayRef sizes, int rank, at::MemoryFormat format) {
  const bool batched = static_cast<int>(sizes.size()) == rank + 2;
  const int64_t n = batched ? sizes[0] : 1;
  const int64_t c = sizes[batched ? 1 : 0];
  p.outer = format == at::MemoryFormat::Contiguous ? n * c : n;
  p.inner = format == at::MemoryFormat::Contiguous ? 1 : c;
}

std::vector<int64_t> with_extents(IntArrayRef sizes, const int64_t (&extents)[3], int rank) {
  std::vector<int64_t> result = sizes.vec();
  for (int i = 0; i < rank; ++i) result[sizes.size() - rank + i] = extents[3 - rank + i];
  return result;
}

// The spatial rank is the number of window sizes: 1, 2 or 3.
int rank_of(IntArrayRef kernel_size, const char* op) {
  const auto rank = static_cast<int>(kernel_size.size());
  TORCH_CHECK(rank >= 1 && rank <= 3, op, ": kernel_size must have 1, 2 or 3 ints, got ", rank);
  return rank;
}

at::ScalarType place_type(const PoolProblem& p) {
  return p.place_bytes() == 1 ? at::kByte : at::kInt;
}

// ---- max -------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, IntArrayRef kernel_size,
                                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                    bool ceil_mode, bool keep_places) {
  const char* op = "max_pool";
  const int rank = rank_of(kernel_size, op);
  PoolProblem p =
      problem_for(input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode}, rank, op);
  p.dtype = dtype_of(input, op, "input");
  const auto& kernels = kernels_for(input, pool_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const auto format = layout_of(input);
  set_layout(p, input.sizes(), rank, format);
  const Tensor x = input.contiguous(format);
  const auto sizes = with_extents(input.sizes(), p.out, rank);
  Tensor y = empty_output(x, sizes, format);
  Tensor places = keep_places ? empty_output(x, sizes, place_type(p), format)
                              : empty_output(x, {0}, place_type(p));
  if (p.out_elements() > 0)
    kernels.max_forward(p, x.const_data_ptr(), y.mutable_data_ptr(),
                        keep_places ? places.mutable_data_ptr() : nullptr, context_for(x));
  return {y, places};
}

// The problem of an existing pair (output-shaped tensor, places).
PoolProblem problem_of_places(const Tensor& places, IntArrayRef input_size,
                              const PoolArguments& arguments, int rank, const char* op) {
  PoolProblem p = problem_for(input_size, arguments, rank, op);
  TORCH_CHECK(places.sizes() == IntArrayRef(with_extents(input_size, p.out, rank)) &&
                  places.scalar_type() == place_type(p),
              op, ": places must come from max_pool with the same arguments; got ",
              toString(places.scalar_type()), places.sizes());
  set_layout(p, input_size, rank, layout_of(places));
  return p;
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& places, IntArrayRef input_size,
                         IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, bool ceil_mode) {
  const char* op = "max_pool_backward";
  PoolProblem p =
      problem_of_places(places, input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                        rank_of(kernel_size, op), op);
  TORCH_CHECK(grad.sizes() == places.sizes(), op, ": grad must have the output's size ",
              places.sizes(), ", got ", grad.sizes());
  p.dtype = dtype_of(grad, op, "grad");
  const auto& kernels = kernels_for(grad, pool_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const auto format = layout_of(places);
  const Tensor gy = grad.contiguous(format);
  const Tensor kept = places.contiguous(format);
  Tensor gx = empty_output(gy, input_size, format);
  if (p.in_elements() > 0)
    kernels.max_backward(p, gy.const_data_ptr(), kept.const_data_ptr(), gx.mutable_data_ptr(),
                         context_for(gy));
  return gx;
}

Tensor max_pool_pick(const Tensor& input, const Tensor& places, IntArrayRef kernel_size,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     bool ceil_mode) {
  const char* op = "max_pool_pick";
  PoolProblem p =
      problem_of_places(places, input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                        rank_of(kernel_size, op), op);
  p.dtype = dtype_of(input, op, "input");
  const auto& kernels = kernels_for(input, pool_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const auto format = layout_of(places);
  const Tensor x = input.contiguous(format);
  const Tensor kept = places.contiguous(format);
  Tensor y = empty_output(x, places.sizes(), format);
  if (p.out_elements() > 0)
    kernels.max_pick(p, x.const_data_ptr(), kept.const_data_ptr(), y.mutable_data_ptr(),
                     context_for(x));
  return y;
}

Tensor max_pool_indices(const Tensor& places, IntArrayRef input_size, IntArrayRef kernel_size,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        bool ceil_mode) {
  const char* op = "max_pool_indices";
  const PoolProblem p =
      problem_of_places(places, input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                        rank_of(kernel_size, op), op);
  const auto& kernels = kernels_for(places, pool_kernels_for);
  const c10::DeviceGuard guard(places.device());
  const auto format = layout_of(places);
  const Tensor kept = places.contiguous(format);
  Tensor indices = empty_output(kept, places.sizes(), at::kLong, format);
  if (p.out_elements() > 0)
    kernels.max_indices(p, kept.const_data_ptr(), indices.mutable_data_ptr<int64_t>(),
                        context_for(kept));
  return indices;
}

// ---- average ---------------------------------------------------------------------------------

PoolProblem avg_problem(IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                        IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                        std::optional<int64_t> divisor_override, int rank, const char* op) {
  static constexpr int64_t kNoDilation[] = {1};
  PoolProblem p =
      problem_for(input_size, {kernel_size, stride, padding, kNoDilation, ceil_mode}, rank, op);
  TORCH_CHECK(divisor_override.value_or(1) != 0, op, ": divisor must be not zero");
  p.divisor = divisor_override.value_or(0);
  p.count_include_pad = count_include_pad;
  return p;
}

Tensor avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool";
  const int rank = rank_of(kernel_size, op);
  PoolProblem p = avg_problem(input.sizes(), kernel_size, stride, padding, ceil_mode,
                              count_include_pad, divisor_override, rank, op);
  p.dtype = dtype_of(input, op, "input");
  const auto& kernels = kernels_for(input, pool_kernels_for);
  const c10::DeviceGuard guard(input.device());
  const auto format = layout_of(input);
  set_layout(p, input.sizes(), rank, format);
  const Tensor x = input.contiguous(format);
  Tensor y = empty_output(x, with_extents(input.sizes(), p.out, rank), format);
  if (p.out_elements() > 0)
    kernels.avg_forward(p, x.const_data_ptr(), y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor avg_pool_backward(const Tensor& grad, IntArrayRef input_size, IntArrayRef kernel_size,
                         IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                         bool count_include_pad, std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool_backward";
  const int rank = rank_of(kernel_size, op);
  PoolProblem p = avg_problem(input_size, kernel_size, stride, padding, ceil_mode,
                              count_include_pad, divisor_override, rank, op);
  TORCH_CHECK(grad.sizes() == IntArrayRef(with_extents(input_size, p.out, rank)), op,
              ": grad must have the output's size ", with_extents(input_size, p.out, rank),
              ", got ", grad.sizes());
  p.dtype = dtype_of(grad, op, "grad");
  const auto& kernels = kernels_for(grad, pool_kernels_for);
  const c10::DeviceGuard guard(grad.device());
  const auto format = layout_of(grad);
  set_layout(p, input_size, rank, format);
  const Tensor gy = grad.contiguous(format);
  Tensor gx = empty_output(gy, input_size, format);
  if (p.in_elements() > 0)
    kernels.avg_backward(p, gy.const_data_ptr(), gx.mutable_data_ptr(), context_for(gy));
  return gx;
}

void implement(torch::Library& m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_backward", max_pool_backward);
  m.impl("max_pool_pick", max_pool_pick);
  m.impl("max_pool_indices", max_pool_indices);
  m.impl("avg_pool", avg_pool);
  m.impl("avg_pool_backward", avg_pool_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "max_pool(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode, bool keep_places) -> (Tensor output, Tensor places)");
  m.def(
      "max_pool_backward(Tensor grad, Tensor places, SymInt[] input_size, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool_pick(Tensor input, Tensor places, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool_indices(Tensor places, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "avg_pool(Tensor input, int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override) -> Tensor");
  m.def(
      "avg_pool_backward(Tensor grad, SymInt[] input_size, int[] kernel_size, int[] stride, "
      "int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
