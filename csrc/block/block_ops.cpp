// The op of a CNN's layer: convolution, activation and pooling as one, cut as block_plan.h says.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "block/block_plan.h"
#include "conv/conv_ops.h"
#include "core/parallel.h"
#include "ops_common.h"
#include "pool/pool_ops.h"

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

PoolRequest windows_of(const ConvRequest& conv, bool maximum, const PoolArguments& arguments) {
  const auto rank = static_cast<int>(conv.output_size.size()) - 2;
  if (maximum) return max_windows(conv.output_size, arguments, {"max_pool", rank});
  return avg_windows(conv.output_size, arguments, true, {}, {"avg_pool", rank});
}

// What training keeps of the unpooled map.
enum class Kept : uint8_t { nothing, places, signs };

bool has_signs(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}

void note(const BlockProblem& b, const BlockPlan& plan, Kept keeps) {
  const ConvProblem& p = b.conv;
  const int64_t pooled = b.pool.out_elements();
  Plan noted;
  noted.kernel = "conv_pooled";
  noted.path = plan.path == BlockPlan::Path::groups ? "groups" : "bands";
  noted.tile = {{plan.path == BlockPlan::Path::groups ? "groups" : "rows", plan.step}};
  noted.threads = static_cast<int>(p.n * plan.parts);
  noted.least_bytes = (p.in_elements() + p.weight_elements() + pooled) * size_of(p.dtype) +
                      (keeps == Kept::places ? pooled * b.pool.place_bytes() : 0) +
                      (keeps == Kept::signs ? p.out_elements() / 8 : 0);
  noted.bytes = noted.least_bytes;
  noted.flops = conv_flops(p, ConvStep::fprop) + pooled * b.pool.window_elements();
  note_plan(std::move(noted));
}

void note(const PoolProblem& p, const SignRows& rows, const BlockGradPlan& plan, int64_t tasks) {
  Plan noted;
  noted.kernel = "conv_pooled_grad";
  noted.path = p.inner > 1 ? "bands" : "planes";
  noted.tile = {{p.inner > 1 ? "rows" : "planes", plan.step}};
  noted.threads = static_cast<int>(tasks);
  noted.least_bytes =
      (p.in_elements() + p.out_elements()) * size_of(p.dtype) + rows.rows * rows.bytes();
  noted.bytes = noted.least_bytes;
  noted.flops = p.in_elements() + p.out_elements() * p.window_elements();
  note_plan(std::move(noted));
}

void run_parts(const BlockProblem& b, const BlockPlan& plan, const ConvRequest& request,
               const SignRows& signs, Kept keeps, Tensor& y, Tensor& kept_of_map) {
  const auto& conv_kernels = kernels_for(request.x, conv_kernels_for);
  const auto& pool_kernels = kernels_for(request.x, pool_kernels_for);
  const auto& sign_kernels = kernels_for(request.x, block_kernels_for);
  const int64_t size = size_of(b.conv.dtype);
  const auto* x = static_cast<const char*>(request.x.const_data_ptr());
  const auto* w = static_cast<const char*>(request.w.const_data_ptr());
  const auto* bias = static_cast<const char*>(request.bias_data());
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  auto* const kept =
      keeps != Kept::nothing ? static_cast<char*>(kept_of_map.mutable_data_ptr()) : nullptr;
  const Context context = context_for(request.x);
  const int64_t tasks = b.conv.n * plan.parts;
  const int64_t members = tasks < context.threads ? tasks : context.threads;
  const Tensor buffers = at::empty({members, plan.buffer}, request.x.options());
  auto* const memory = static_cast<char*>(buffers.mutable_data_ptr());
  parallel_team(context, tasks, [&](const Team& team) {
    const Context alone;
    void* const buffer = memory + team.member * plan.buffer * size;
    for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
      const BlockPart part = part_of(b, plan, task);
      conv_kernels.fprop(part.conv, x + part.x * size, w + part.w * size,
                         bias ? bias + part.bias * size : nullptr, buffer, alone);
      if (keeps == Kept::signs) {
        SignRows rows = signs;
        rows.rows = part.signs;
        sign_kernels.keep_signs(
            rows, buffer, reinterpret_cast<uint8_t*>(kept) + part.sign * signs.bytes(), alone);
      }
      if (b.maximum)
        pool_kernels.max_forward(
            part.pool, buffer, out + part.y * size,
            keeps == Kept::places ? kept + part.y * b.pool.place_bytes() : nullptr, alone);
      else
        pool_kernels.avg_forward(part.pool, buffer, out + part.y * size, alone);
    }
  });
}

// (output, kept): with `keep`, the places of maxima or, of averages after relu and leaky relu, the
// signs of the unpooled map; else nothing.
std::tuple<Tensor, Tensor> conv_pooled(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    c10::string_view activation, double slope, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, c10::string_view pooling, IntArrayRef pool_size,
    IntArrayRef pool_stride, IntArrayRef pool_padding, bool keep) {
  TORCH_CHECK_VALUE(pooling == "max" || pooling == "avg",
                    "conv_pooled: expected pooling to be 'max' or 'avg', got '", pooling, "'");
  const bool maximum = pooling == "max";
  const ConvRequest conv =
      conv_request(input, weight, bias, activation, slope, stride, padding, dilation, groups);
  const std::vector<int64_t> once(pool_size.size(), 1);
  PoolRequest pool = windows_of(conv, maximum, {pool_size, pool_stride, pool_padding, once, false});
  BlockProblem b{conv.problem, pool.problem, maximum};
  b.pool.dtype = b.conv.dtype;
  // Every window lies inside the padded map; a part does not know where that ends.
  if (!maximum) b.pool.divisor = b.pool.window_elements();
  b.pool.outer = b.conv.channels_last ? b.conv.n : b.conv.n * b.conv.out_channels();
  b.pool.inner = b.conv.channels_last ? b.conv.out_channels() : 1;

  const Kept keeps = !keep                          ? Kept::nothing
                     : maximum                      ? Kept::places
                     : has_signs(b.conv.activation) ? Kept::signs
                                                    : Kept::nothing;
  const auto kept_type = !maximum || b.pool.place_bytes() == 1 ? at::kByte : at::kInt;
  const SignRows signs = sign_rows(b.pool, b.conv.channels_last, b.conv.activation, b.conv.slope);
  Tensor kept = at::empty({0}, input.options().dtype(kept_type));
  const auto sign_memory = [&] {
    return empty_output(conv.x, {signs.rows, signs.bytes()}, kept_type);
  };
  const Target target = planning() ? planned_target() : target_for(input);
  BlockPlan plan;
  if (is_cpu(target)) plan = plan_block(b, conv_lanes(target, b.conv.dtype));
  const bool too_few = !planning() && b.conv.n * plan.parts < context_for(input).threads;
  const c10::DeviceGuard guard(input.device());
  if (plan.path == BlockPlan::Path::sequence || too_few) {
    const Tensor whole = run_conv(conv);
    if (maximum) return max_of(std::move(pool), whole, keep);
    if (keeps == Kept::signs) kept = sign_memory();
    if (kept.numel() > 0 && !planning())
      kernels_for(whole, block_kernels_for)
          .keep_signs(signs, whole.const_data_ptr(), kept.mutable_data_ptr<uint8_t>(),
                      context_for(whole));
    return {mean_of(std::move(pool), whole), kept};
  }
  Tensor y = empty_output(conv.x, pool.output_sizes, conv.format);
  if (keeps == Kept::places) kept = empty_output(conv.x, pool.output_sizes, kept_type, conv.format);
  if (keeps == Kept::signs) kept = sign_memory().zero_();  // no part keeps rows between windows
  if (planning())
    note(b, plan, keeps);
  else
    run_parts(b, plan, conv, signs, keeps, y, kept);
  return {y, kept};
}

// The gradient of the sum that an average of `size` with its activation was made of, from the signs
// that conv_pooled kept.
Tensor conv_pooled_grad(const Tensor& grad, const Tensor& signs, IntArrayRef size,
                        c10::string_view activation, double slope, IntArrayRef pool_size,
                        IntArrayRef pool_stride, IntArrayRef pool_padding, bool channels_last) {
  const auto rank = static_cast<int>(size.size()) - 2;
  const char* op = "conv_pooled_grad";
  const Activation kind = activation_of(activation, slope);
  TORCH_CHECK_VALUE(has_signs(kind), op, ": expected activation to be relu or leaky_relu, got ",
                    activation);
  const std::vector<int64_t> once(pool_size.size(), 1);
  const PoolRequest request = avg_windows(size, {pool_size, pool_stride, pool_padding, once, false},
                                          true, {}, {"avg_pool", rank, "_backward"});
  TORCH_CHECK(grad.sizes() == IntArrayRef(request.output_sizes), op, ": expected grad of size ",
              IntArrayRef(request.output_sizes), ", got ", grad.sizes());
  PoolProblem p = request.problem;
  p.dtype = dtype_of(grad, op, "grad");
  p.divisor = p.window_elements();
  p.outer = channels_last ? size[0] : size[0] * size[1];
  p.inner = channels_last ? size[1] : 1;
  const SignRows rows = sign_rows(p, channels_last, kind, slope);
  TORCH_CHECK(signs.scalar_type() == at::kByte && signs.is_contiguous() &&
                  signs.sizes() == IntArrayRef({rows.rows, rows.bytes()}),
              op, ": expected contiguous uint8 signs of size [", rows.rows, ", ", rows.bytes(),
              "], got ", signs.scalar_type(), " of size ", signs.sizes());
  TORCH_CHECK(signs.device() == grad.device(), op, ": expected signs on ", grad.device(),
              " as grad is, got ", signs.device());
  const auto* const bits = static_cast<const uint8_t*>(signs.const_data_ptr());
  const c10::DeviceGuard guard(grad.device());
  if (!is_cpu(planning() ? planned_target() : target_for(grad))) {
    Tensor gx = mean_gradient(request, grad, channels_last);
    if (gx.numel() > 0 && !planning())
      kernels_for(gx, block_kernels_for)
          .pass_signs(rows, bits, gx.mutable_data_ptr(), context_for(gx));
    return gx;
  }
  const auto format = !channels_last ? at::MemoryFormat::Contiguous
                      : rank == 3    ? at::MemoryFormat::ChannelsLast3d
                                     : at::MemoryFormat::ChannelsLast;
  const Tensor gy = grad.contiguous(format);
  Tensor gx = empty_output(gy, size, format);
  if (p.in_elements() == 0) return gx;
  const BlockGradPlan plan = plan_block_grad(p, channels_last);
  const int64_t tasks = channels_last ? p.outer * plan.parts : plan.parts;
  if (planning()) {
    note(p, rows, plan, tasks);
    return gx;
  }
  const auto& kernels = kernels_for(gy, pool_kernels_for);
  const auto& sign_kernels = kernels_for(gy, block_kernels_for);
  const int64_t element = size_of(p.dtype);
  const auto* const from = static_cast<const char*>(gy.const_data_ptr());
  auto* const to = static_cast<char*>(gx.mutable_data_ptr());
  parallel_for(context_for(gy), tasks, 1, [&](int64_t begin, int64_t end) {
    const Context alone;
    for (int64_t task = begin; task < end; ++task) {
      const BlockGradPart part = grad_part_of(p, plan, channels_last, task);
      SignRows of_part = rows;
      of_part.rows = part.signs;
      char* const out = to + part.x * element;
      if (part.pool.out_elements() == 0) {  // between two windows
        memset(out, 0, part.pool.in_elements() * element);
        continue;
      }
      kernels.avg_backward(part.pool, from + part.y * element, out, alone);
      sign_kernels.pass_signs(of_part, bits + part.sign * rows.bytes(), out, alone);
    }
  });
  return gx;
}

[[maybe_unused]] const bool plans_registered =
    register_planned_ops({"conv_pooled", "conv_pooled_grad"});

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "conv_pooled(Tensor input, Tensor weight, Tensor? bias, str activation, float slope, int[] "
      "stride, int[] padding, int[] dilation, int groups, str pooling, int[] pool_size, int[] "
      "pool_stride, int[] pool_padding, bool keep) -> (Tensor output, Tensor kept)");
  m.def(
      "conv_pooled_grad(Tensor grad, Tensor signs, SymInt[] size, str activation, float slope, "
      "int[] pool_size, int[] pool_stride, int[] pool_padding, bool channels_last) -> Tensor");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) {
  m.impl("conv_pooled", conv_pooled);
  m.impl("conv_pooled_grad", conv_pooled_grad);
}
TORCH_LIBRARY_IMPL(weft, CUDA, m) {
  m.impl("conv_pooled", conv_pooled);
  m.impl("conv_pooled_grad", conv_pooled_grad);
}

}  // namespace weft
