// Pooling ops: complete the arguments into a request (pool_request_ops.cpp), allocate, run the
// kernel.
#include "pool/pool_ops.h"
#include "ops_common.h"
#include "pool/pool_plan.h"
#include "pool/pool_plan_cuda.h"

#include <c10/core/DeviceGuard.h>

#include <utility>

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

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

void set_layout(PoolRequest& request, at::MemoryFormat format) {
  PoolProblem& p = request.problem;
  const IntArrayRef sizes = request.input_sizes;
  const bool batched = static_cast<int>(sizes.size()) == request.op.rank + 2;
  const int64_t n = batched ? sizes[0] : 1;
  const int64_t c = sizes[batched ? 1 : 0];
  p.outer = format == at::MemoryFormat::Contiguous ? n * c : n;
  p.inner = format == at::MemoryFormat::Contiguous ? 1 : c;
}

// Completes the problem by the layout and by the dtype of `values`, and picks the kernels.
const PoolKernels& complete(PoolRequest& request, const Tensor& values, const char* argument,
                            at::MemoryFormat format) {
  set_layout(request, format);
  request.problem.dtype = dtype_of(values, request.op.stem, argument);
  return kernels_for(values, pool_kernels_for);
}

at::ScalarType place_type(const PoolProblem& p) {
  return p.place_bytes() == 1 ? at::kByte : at::kInt;
}

void check_places(const PoolRequest& request, const Tensor& places) {
  TORCH_CHECK(places.sizes() == IntArrayRef(request.output_sizes) &&
                  places.scalar_type() == place_type(request.problem),
              request.op, ": places must come from ", request.op.stem,
              " with the same arguments; got ", toString(places.scalar_type()), places.sizes());
}

// The places that `values` are picked at, or added to.
void check_places(const PoolRequest& request, const Tensor& places, const Tensor& values) {
  check_places(request, places);
  TORCH_CHECK(places.device() == values.device(), request.op,
              ": expected all tensors to be on the same device, but places are on ",
              places.device(), " and the values on ", values.device());
}

void check_gradient(const PoolRequest& request, const Tensor& grad) {
  TORCH_CHECK(grad.sizes() == IntArrayRef(request.output_sizes), request.op,
              ": grad must have the output's size ", request.output_sizes, ", got ", grad.sizes());
}

// ---- plans -----------------------------------------------------------------------------------

const char* cpu_path(const PoolProblem& p, PoolStep step) {
  const PoolProblem fixed = pool_with_fixed_windows(p);
  const bool turns =
      step != PoolStep::max_backward && step != PoolStep::max_pick && step != PoolStep::max_indices;
  if (pool_takes_lanes(p, step == PoolStep::max_forward_places) && turns)
    return name_of(PoolPath::lanes);
  if (pool_transposes(p) && turns) return "transposed";
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
  if (is_cpu(target)) {
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
  if (t.strip != 0) plan.tile.emplace_back("strip", t.strip);
  return plan;
}

// True where plans are asked for: what would run is noted, and nothing need run.
bool planned(const PoolProblem& p, PoolStep step) {
  if (!planning()) return false;
  note_plan(describe(p, step));
  return true;
}

}  // namespace

bool is_channels_last(const Tensor& t, int rank) {
  return layout_of(t, rank) != at::MemoryFormat::Contiguous;
}

// ---- maximum, whatever the windows -----------------------------------------------------------

std::tuple<Tensor, Tensor> max_of(PoolRequest request, const Tensor& input, bool keep_places) {
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

Tensor max_gradient(PoolRequest request, const Tensor& grad, const Tensor& places,
                    bool channels_last) {
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

// ---- average, whatever the windows -----------------------------------------------------------

Tensor mean_of(PoolRequest request, const Tensor& input) {
  const auto format = layout_of(input, request.op.rank);
  const auto& kernels = complete(request, input, "input", format);
  const c10::DeviceGuard guard(input.device());
  const Tensor x = input.contiguous(format);
  Tensor y = empty_output(x, request.output_sizes, format);
  if (request.problem.out_elements() > 0 && !planned(request.problem, PoolStep::avg_forward))
    kernels.avg_forward(request.problem, x.const_data_ptr(), y.mutable_data_ptr(), context_for(x));
  return y;
}

Tensor mean_gradient(PoolRequest request, const Tensor& grad, bool channels_last) {
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

namespace {

// ---- what the second derivative and torch's indices take

Tensor picked(PoolRequest request, const Tensor& input, const Tensor& places) {
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

Tensor indices_of(PoolRequest request, const Tensor& places) {
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

// ---- fixed windows ---------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, IntArrayRef kernel_size,
                                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                    bool ceil_mode, bool keep_places) {
  return max_of(max_windows(input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                            name_of("max_pool", kernel_size)),
                input, keep_places);
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& places, IntArrayRef input_size,
                         IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                         IntArrayRef dilation, bool ceil_mode, bool channels_last) {
  return max_gradient(max_windows(input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                                  name_of("max_pool", kernel_size, "_backward")),
                      grad, places, channels_last);
}

Tensor max_pool_pick(const Tensor& input, const Tensor& places, IntArrayRef kernel_size,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     bool ceil_mode) {
  return picked(max_windows(input.sizes(), {kernel_size, stride, padding, dilation, ceil_mode},
                            name_of("max_pool", kernel_size, "_pick")),
                input, places);
}

Tensor max_pool_indices(const Tensor& places, IntArrayRef input_size, IntArrayRef kernel_size,
                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                        bool ceil_mode) {
  return indices_of(max_windows(input_size, {kernel_size, stride, padding, dilation, ceil_mode},
                                name_of("max_pool", kernel_size, "_indices")),
                    places);
}

constexpr int64_t kNoDilation[] = {1};

Tensor avg_pool(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override) {
  return mean_of(avg_windows(input.sizes(), {kernel_size, stride, padding, kNoDilation, ceil_mode},
                             count_include_pad, divisor_override, name_of("avg_pool", kernel_size)),
                 input);
}

Tensor avg_pool_backward(const Tensor& grad, IntArrayRef input_size, IntArrayRef kernel_size,
                         IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                         bool count_include_pad, std::optional<int64_t> divisor_override,
                         bool channels_last) {
  return mean_gradient(
      avg_windows(input_size, {kernel_size, stride, padding, kNoDilation, ceil_mode},
                  count_include_pad, divisor_override,
                  name_of("avg_pool", kernel_size, "_backward")),
      grad, channels_last);
}

// ---- adaptive windows ------------------------------------------------------------------------

std::tuple<Tensor, Tensor> adaptive_max_pool(const Tensor& input, IntArrayRef output_size,
                                             bool keep_places) {
  const OpName op = name_of("adaptive_max_pool", output_size);
  return max_of(adaptive_max_windows(input.sizes(), output_size, op), input, keep_places);
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
