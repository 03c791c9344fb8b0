// The op of a CNN's layer: convolution, activation and pooling as one, cut as block_plan.h says.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "block/block_ops.h"
#include "core/parallel.h"
#include "ops_common.h"

namespace weft {
namespace {

using at::IntArrayRef;
using at::Tensor;

// What training keeps of the unpooled map.
enum class Kept : uint8_t { nothing, places, signs };

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
  const ConvRequest conv =
      conv_request(input, weight, bias, activation, slope, stride, padding, dilation, groups);
  auto [b, pool] = block_request(conv, pooling, pool_size, pool_stride, pool_padding);
  const bool maximum = b.maximum;
  const Kept keeps = !keep                                ? Kept::nothing
                     : maximum                            ? Kept::places
                     : block_has_signs(b.conv.activation) ? Kept::signs
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

[[maybe_unused]] const bool plans_registered = register_planned_ops({"conv_pooled"});

}  // namespace

BlockRequest block_request(const ConvRequest& conv, c10::string_view pooling, IntArrayRef size,
                           IntArrayRef stride, IntArrayRef padding) {
  TORCH_CHECK_VALUE(pooling == "max" || pooling == "avg",
                    "conv_pooled: expected pooling to be 'max' or 'avg', got '", pooling, "'");
  const bool maximum = pooling == "max";
  const auto rank = static_cast<int>(conv.output_size.size()) - 2;
  const std::vector<int64_t> once(size.size(), 1);
  const PoolArguments arguments = {size, stride, padding, once, false};
  PoolRequest pool = maximum
                         ? max_windows(conv.output_size, arguments, {"max_pool", rank})
                         : avg_windows(conv.output_size, arguments, true, {}, {"avg_pool", rank});
  BlockProblem b{conv.problem, pool.problem, maximum};
  b.pool.dtype = b.conv.dtype;
  // Every window lies inside the padded map; a part does not know where that ends.
  if (!maximum) b.pool.divisor = b.pool.window_elements();
  b.pool.outer = b.conv.channels_last ? b.conv.n : b.conv.n * b.conv.out_channels();
  b.pool.inner = b.conv.channels_last ? b.conv.out_channels() : 1;
  return {b, std::move(pool)};
}

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "conv_pooled(Tensor input, Tensor weight, Tensor? bias, str activation, float slope, int[] "
      "stride, int[] padding, int[] dilation, int groups, str pooling, int[] pool_size, int[] "
      "pool_stride, int[] pool_padding, bool keep) -> (Tensor output, Tensor kept)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { m.impl("conv_pooled", conv_pooled); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { m.impl("conv_pooled", conv_pooled); }

}  // namespace weft
