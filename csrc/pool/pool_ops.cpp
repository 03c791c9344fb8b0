// Pooling ops: check the arguments, complete them into a PoolProblem, allocate, run the kernel.
#include "ops_common.h"
#include "pool/pool.h"
#include "pool/pool_plan.h"
#include "pool/pool_plan_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <limits>
#include <optional>
#include <ostream>
#include <vector>

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

// The op as the user called it: max_pool of rank 2 is max_pool2d.
struct OpName {
  const char* stem;
  int rank;
  const char* suffix = "";
};

std::ostream& operator<<(std::ostream& out, const OpName& name) {
  return out << name.stem << name.rank << 'd' << name.suffix;
}

// A problem, the sizes of its tensors as torch has them, and who asked.
struct Request {
  OpName op;
  PoolProblem problem;
  std::vector<int64_t> input_sizes;
  std::vector<int64_t> output_sizes;
};

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

struct PoolArguments {
  IntArrayRef kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

void check_dims(IntArrayRef sizes, const OpName& op) {
  const auto dims = static_cast<int>(sizes.size());
  TORCH_CHECK(dims == op.rank + 1 || dims == op.rank + 2, op, ": Expected ", op.rank + 1, "D or ",
              op.rank + 2, "D (batch mode) tensor, but got input of size ", sizes);
}

// The last `axes` sizes may not be empty.
void check_not_empty(IntArrayRef sizes, int axes, const OpName& op) {
  const auto dims = static_cast<int>(sizes.size());
  for (int i = dims - axes; i < dims; ++i)
    TORCH_CHECK(sizes[i] > 0, op,
                ": Expected input to have non-zero size for non-batch dimensions, but got ", sizes,
                " with dimension ", i, " being empty");
}

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

// Fills everything but dtype, layout and divisor; `sizes` are the input's, batched or not.
Request fixed_windows(IntArrayRef sizes, const PoolArguments& a, const OpName& op) {
  check_dims(sizes, op);
  const int rank = op.rank;
  const auto dims = static_cast<int>(sizes.size());
  Request request{op, {}, sizes.vec(), sizes.vec()};
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

Request adaptive_windows(IntArrayRef sizes, IntArrayRef output_size, const OpName& op) {
  check_dims(sizes, op);
  const int rank = op.rank;
  const auto dims = static_cast<int>(sizes.size());
  check_not_empty(sizes, rank, op);
  Request request{op, {}, sizes.vec(), sizes.vec()};
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

// The spatial rank is the number of window sizes: 1, 2 or 3.
OpName name_of(const char* stem, IntArrayRef per_axis, const char* suffix = "") {
  const auto rank = static_cast<int>(per_axis.size());
  TORCH_CHECK(rank >= 1 && rank <= 3, stem, ": expected 1, 2 or 3 ints, one per axis, got ", rank);
  return {stem, rank, suffix};
}

// Unbatched tensors have no channels-last form.
at::MemoryFormat layout_of(const Tensor& t, int rank) {
  return t.dim() == rank + 2 ? weft::layout_of(t) : at::MemoryFormat::Contiguous;
}

// Gradients take the layout of the input that they belong to.
at::MemoryFormat layout_from(bool channels_last, IntArrayRef sizes) {
  if (!channels_last) return at::MemoryFormat::Contiguous;
  return sizes.size() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

void set_layout(Request& request, at::MemoryFormat format) {
  PoolProblem& p = request.problem;
  const IntArrayRef sizes = request.input_sizes;
  const bool batched = static_cast<int>(sizes.size()) == request.op.rank + 2;
  const int64_t n = batched ? sizes[0] : 1;
  const int64_t c = sizes[batched ? 1 : 0];
  p.outer = format == at::MemoryFormat::Contiguous ? n * c : n;
  p.inner = format == at::MemoryFormat::Contiguous ? 1 : c;
}

// Completes the problem by the layout and by the dtype of `values`, and picks the kernels.
const PoolKernels& complete(Request& request, const Tensor& values, const char* argument,
                            at::MemoryFormat format) {
  set_layout(request, format);
  request.problem.dtype = dtype_of(values, request.op.stem, argument);
  return kernels_for(values, pool_kernels_for);
}

at::ScalarType place_type(const PoolProblem& p) {
  return p.place_bytes() == 1 ? at::kByte : at::kInt;
}

void check_places(const Request& request, const Tensor& places) {
  TORCH_CHECK(places.sizes() == IntArrayRef(request.output_sizes) &&
                  places.scalar_type() == place_type(request.problem),
              request.op, ": places must come from ", request.op.stem,
              " with the same arguments; got ", toString(places.scalar_type()), places.sizes());
}

// The places that `values` are picked at, or added to.
void check_places(const Request& request, const Tensor& places, const Tensor& values) {
  check_places(request, places);
  TORCH_CHECK(places.device() == values.device(), request.op,
              ": expected all tensors to be on the same device, but places are on ",
              places.device(), " and the values on ", values.device());
}

void check_gradient(const Request& request, const Tensor& grad) {
  TORCH_CHECK(grad.sizes() == IntArrayRef(request.output_sizes), request.op,
              ": grad must have the output's size ", request.output_sizes, ", got ", grad.sizes());
}

// ---- plans -----------------------------------------------------------------------------------

const char* cpu_path(const PoolProblem& p, PoolStep step) {
  const PoolProblem fixed = pool_with_fixed_windows(p);
  switch (step) {
    case PoolStep::max_forward:
    case PoolStep::avg_forward:
      return name_of(pool_values_path(fixed));
    case PoolStep::max_forward_places:
      return name_of(pool_places_path(p));
    case PoolStep::max_backward:
      return name_of(pool_max_gradient_path(fixed));
    case PoolStep::avg_backward:
      return name_of(pool_avg_gradient_path(fixed));
    default:
      return "walk";
  }
}

Plan describe(const PoolProblem& p, PoolStep step) {
  const PoolPlan cuda = plan_pool(p, step);
  Plan plan;
  plan.least_bytes = plan.bytes = cuda.least_bytes;
  plan.flops = cuda.flops;
  const Target target = planned_target();
  if (target != Target::cuda && target != Target::cuda_on_host) {
    plan.kernel = name_of(step);
    plan.path = cpu_path(p, step);
    return plan;
  }
  plan.kernel = kernel_of(p, step, cuda);
  plan.path = name_of(cuda.path);
  plan.bytes = cuda.bytes;
  plan.blocks = cuda.blocks;
  plan.threads = cuda.threads;
  plan.shared_bytes = cuda.shared_bytes;
  if (cuda.path == PoolPlan::Path::walk) return plan;
  const PoolTile& t = cuda.tile;
  for (const auto& [axis, extent] : std::initializer_list<std::pair<const char*, int64_t>>{
           {"outer", t.outer}, {"d", t.d}, {"h", t.h}, {"w", t.w}, {"c", t.c}})
    plan.tile.emplace_back(axis, extent);
  return plan;
}

// True where plans are asked for: what would run is noted, and nothing need run.
bool planned(const PoolProblem& p, PoolStep step) {
  if (!planning()) return false;
  note_plan(describe(p, step));
  return true;
}

// ---- maximum, whatever the windows -----------------------------------------------------------

std::tuple<Tensor, Tensor> max_of(Request request, const Tensor& input, bool keep_places) {
  const auto format = layout_of(input, request.op.rank);
  const auto& kernels = complete(request, input, "input", format);
  const PoolProblem& p = request.problem;
  const c10::DeviceGuard guard(input.device());
  const Tensor x = input.contiguous(format);
  Tensor y = empty_output(x, request.output_sizes, format);
  Tensor places = keep_places ? empty_output(x, request.output_sizes, place_type(p), format)
                              : empty_output(x, {0}, place_type(p));
  const auto step = keep_places ? PoolStep::max_forward_places : PoolStep::max_forward;
  if (p.out_elements() > 0 && !planned(p, step))
    kernels.max_forward(p, x.const_data_ptr(), y.mutable_data_ptr(),
                        keep_places ? places.mutable_data_ptr() : nullptr, context_for(x));
  return {y, places};
}

Tensor max_gradient(Request request, const Tensor& grad, const Tensor& places, bool channels_last) {
  check_places(request, places, grad);
  check_gradient(request, grad);
  const auto format = layout_from(channels_last, request.input_sizes);
  const auto& kernels = complete(request, grad, "grad", format);
  const c10::DeviceGuard guard(grad.device());
  const Tensor gy = grad.contiguous(format);
  const Tensor kept = places.contiguous(format);
  Tensor gx = empty_output(gy, request.input_sizes, format);
  if (request.problem.in_elements() > 0 && !planned(request.problem, PoolStep::max_backward))
    kernels.max_backward(request.problem, gy.const_data_ptr(), kept.const_data_ptr(),
                         gx.mutable_data_ptr(), context_for(gy));
  return gx;
}

Tensor picked(Request request, const Tensor& input, const Tensor& places) {
  check_places(request, places, input);
  const auto format = layout_of(places, request.op.rank);
  const auto& kernels = complete(request, input, "input", format);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = input.contiguous(format);
  const Tensor kept = places.contiguous(format);
  Tensor y = empty_output(x, places.sizes(), format);
  if (request.problem.out_elements() > 0 && !planned(request.problem, PoolStep::max_pick))
    kernels.max_pick(request.problem, x.const_data_ptr(), kept.const_data_ptr(),
                     y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor indices_of(Request request, const Tensor& places) {
  check_places(request, places);
  const auto format = layout_of(places, request.op.rank);
  set_layout(request, format);
  const auto& kernels = kernels_for(places, pool_kernels_for);
  const c10::DeviceGuard guard(places.device());
  const Tensor kept = places.contiguous(format);
  Tensor indices = empty_output(kept, places.sizes(), at::kLong, format);
  if (request.problem.out_elements() > 0 && !planned(request.problem, PoolStep::max_indices))
    kernels.max_indices(request.problem, kept.const_data_ptr(), indices.mutable_data_ptr<int64_t>(),
                        context_for(kept));
  return indices;
}

// ---- average, whatever the windows -----------------------------------------------------------

Tensor mean_of(Request request, const Tensor& input) {
  const auto format = layout_of(input, request.op.rank);
  const auto& kernels = complete(request, input, "input", format);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = input.contiguous(format);
  Tensor y = empty_output(x, request.output_sizes, format);
  if (request.problem.out_elements() > 0 && !planned(request.problem, PoolStep::avg_forward))
    kernels.avg_forward(request.problem, x.const_data_ptr(), y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor mean_gradient(Request request, const Tensor& grad, bool channels_last) {
  check_gradient(request, grad);
  const auto format = layout_from(channels_last, request.input_sizes);
  const auto& kernels = complete(request, grad, "grad", format);
  const c10::DeviceGuard guard(grad.device());
  const Tensor gy = grad.contiguous(format);
  Tensor gx = empty_output(gy, request.input_sizes, format);
  if (request.problem.in_elements() > 0 && !planned(request.problem, PoolStep::avg_backward))
    kernels.avg_backward(request.problem, gy.const_data_ptr(), gx.mutable_data_ptr(),
                         context_for(gy));
  return gx;
}

// ---- fixed windows ---------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, IntArrayRef kernel_size,
                                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                    bool ceil_mode, bool keep_places) {
  return max_of(fixed_windows(input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                              name_of("max_pool", kernel_size)),
                input, keep_places);
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& places, IntArrayRef input_size,
                         IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, bool ceil_mode, bool channels_last) {
  return max_gradient(fixed_windows(input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                                    name_of("max_pool", kernel_size, "_backward")),
                      grad, places, channels_last);
}

Tensor max_pool_pick(const Tensor& input, const Tensor& places, IntArrayRef kernel_size,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     bool ceil_mode) {
  return picked(fixed_windows(input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                              name_of("max_pool", kernel_size, "_pick")),
                input, places);
}

Tensor max_pool_indices(const Tensor& places, IntArrayRef input_size, IntArrayRef kernel_size,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        bool ceil_mode) {
  return indices_of(fixed_windows(input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                                  name_of("max_pool", kernel_size, "_indices")),
                    places);
}

Request avg_windows(IntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                    IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                    std::optional<int64_t> divisor_override, const char* suffix) {
  static constexpr int64_t kNoDilation[] = {1};
  const OpName op = name_of("avg_pool", kernel_size, suffix);
  Request request =
      fixed_windows(input_size, {kernel_size, stride, padding, kNoDilation, ceil_mode}, op);
  TORCH_CHECK(divisor_override.value_or(1) != 0, op, ": divisor must be not zero");
  request.problem.divisor = divisor_override.value_or(0);
  request.problem.count_include_pad = count_include_pad;
  return request;
}

Tensor avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override) {
  return mean_of(avg_windows(input.sizes(), kernel_size, stride, padding, ceil_mode,
                             count_include_pad, divisor_override, ""),
                 input);
}

Tensor avg_pool_backward(const Tensor& grad, IntArrayRef input_size, IntArrayRef kernel_size,
                         IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                         bool count_include_pad, std::optional<int64_t> divisor_override,
                         bool channels_last) {
  return mean_gradient(avg_windows(input_size, kernel_size, stride, padding, ceil_mode,
                                   count_include_pad, divisor_override, "_backward"),
                       grad, channels_last);
}

// ---- adaptive windows ------------------------------------------------------------------------

std::tuple<Tensor, Tensor> adaptive_max_pool(const Tensor& input, IntArrayRef output_size,
                                             bool keep_places) {
  const OpName op = name_of("adaptive_max_pool", output_size);
  check_dims(input.sizes(), op);
  check_not_empty(input.sizes(), op.rank + 1, op);
  return max_of(adaptive_windows(input.sizes(), output_size, op), input, keep_places);
}

Tensor adaptive_max_pool_backward(const Tensor& grad, const Tensor& places, IntArrayRef input_size,
                                  IntArrayRef output_size, bool channels_last) {
  const OpName op = name_of("adaptive_max_pool", output_size, "_backward");
  return max_gradient(adaptive_windows(input_size, output_size, op), grad, places, channels_last);
}

Tensor adaptive_max_pool_pick(const Tensor& input, const Tensor& places, IntArrayRef output_size) {
  const OpName op = name_of("adaptive_max_pool", output_size, "_pick");
  return picked(adaptive_windows(input.sizes(), output_size, op), input, places);
}

Tensor adaptive_max_pool_indices(const Tensor& places, IntArrayRef input_size,
                                 IntArrayRef output_size) {
  const OpName op = name_of("adaptive_max_pool", output_size, "_indices");
  return indices_of(adaptive_windows(input_size, output_size, op), places);
}

Tensor adaptive_avg_pool(const Tensor& input, IntArrayRef output_size) {
  const OpName op = name_of("adaptive_avg_pool", output_size);
  return mean_of(adaptive_windows(input.sizes(), output_size, op), input);
}

Tensor adaptive_avg_pool_backward(const Tensor& grad, IntArrayRef input_size,
                                  IntArrayRef output_size, bool channels_last) {
  const OpName op = name_of("adaptive_avg_pool", output_size, "_backward");
  return mean_gradient(adaptive_windows(input_size, output_size, op), grad, channels_last);
}

[[maybe_unused]] const bool plans_registered = register_planned_ops(
    {"max_pool", "max_pool_backward", "max_pool_pick", "max_pool_indices", "avg_pool",
     "avg_pool_backward", "adaptive_max_pool", "adaptive_max_pool_backward",
     "adaptive_max_pool_pick", "adaptive_max_pool_indices", "adaptive_avg_pool",
     "adaptive_avg_pool_backward"});

void implement(torch::Library& m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_backward", max_pool_backward);
  m.impl("max_pool_pick", max_pool_pick);
  m.impl("max_pool_indices", max_pool_indices);
  m.impl("avg_pool", avg_pool);
  m.impl("avg_pool_backward", avg_pool_backward);
  m.impl("adaptive_max_pool", adaptive_max_pool);
  m.impl("adaptive_max_pool_backward", adaptive_max_pool_backward);
  m.impl("adaptive_max_pool_pick", adaptive_max_pool_pick);
  m.impl("adaptive_max_pool_indices", adaptive_max_pool_indices);
  m.impl("adaptive_avg_pool", adaptive_avg_pool);
  m.impl("adaptive_avg_pool_backward", adaptive_avg_pool_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "max_pool(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "bool ceil_mode, bool keep_places) -> (Tensor output, Tensor places)");
  m.def(
      "max_pool_backward(Tensor grad, Tensor places, SymInt[] input_size, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, bool ceil_mode, bool channels_last) -> Tensor");
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
      "int[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override, "
      "bool channels_last) -> Tensor");
  m.def(
      "adaptive_max_pool(Tensor input, SymInt[] output_size, bool keep_places) -> "
      "(Tensor output, Tensor places)");
  m.def(
      "adaptive_max_pool_backward(Tensor grad, Tensor places, SymInt[] input_size, "
      "SymInt[] output_size, bool channels_last) -> Tensor");
  m.def("adaptive_max_pool_pick(Tensor input, Tensor places, SymInt[] output_size) -> Tensor");
  m.def(
      "adaptive_max_pool_indices(Tensor places, SymInt[] input_size, SymInt[] output_size) -> "
      "Tensor");
  m.def("adaptive_avg_pool(Tensor input, SymInt[] output_size) -> Tensor");
  m.def(
      "adaptive_avg_pool_backward(Tensor grad, SymInt[] input_size, SymInt[] output_size, "
      "bool channels_last) -> Tensor");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { implement(m); }

}  // namespace weft
