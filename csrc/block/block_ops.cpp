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

void note(const BlockProblem& b, const BlockPlan& plan, bool keeps) {
  const ConvProblem& p = b.conv;
  const int64_t pooled = b.pool.out_elements();
  Plan noted;
  noted.kernel = "conv_pooled";
  noted.path = plan.path == BlockPlan::Path::groups ? "groups" : "bands";
  noted.tile = {{plan.path == BlockPlan::Path::groups ? "groups" : "rows", plan.step}};
  noted.threads = static_cast<int>(p.n * plan.parts);
  noted.least_bytes = (p.in_elements() + p.weight_elements() + pooled) * size_of(p.dtype) +
                      (keeps ? pooled * b.pool.place_bytes() : 0);
  noted.bytes = noted.least_bytes;
  noted.flops = conv_flops(p, ConvStep::fprop) + pooled * b.pool.window_elements();
  note_plan(std::move(noted));
}

void run_parts(const BlockProblem& b, const BlockPlan& plan, const ConvRequest& request, Tensor& y,
               Tensor* places) {
  const auto& conv_kernels = kernels_for(request.x, conv_kernels_for);
  const auto& pool_kernels = kernels_for(request.x, pool_kernels_for);
  const int64_t size = size_of(b.conv.dtype);
  const auto* x = static_cast<const char*>(request.x.const_data_ptr());
  const auto* w = static_cast<const char*>(request.w.const_data_ptr());
  const auto* bias = static_cast<const char*>(request.bias_data());
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  auto* kept = places ? static_cast<char*>(places->mutable_data_ptr()) : nullptr;
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
      if (b.maximum)
        pool_kernels.max_forward(part.pool, buffer, out + part.y * size,
                                 kept ? kept + part.y * b.pool.place_bytes() : nullptr, alone);
      else
        pool_kernels.avg_forward(part.pool, buffer, out + part.y * size, alone);
    }
  });
}

// (output, places); the places are empty unless a maximum is to keep them.
std::tuple<Tensor, Tensor> conv_pooled(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    c10::string_view activation, double slope, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, int64_t groups, c10::string_view pooling, IntArrayRef pool_size,
    IntArrayRef pool_stride, IntArrayRef pool_padding, bool keep_places) {
  TORCH_CHECK_VALUE(pooling == "max" || pooling == "avg",
                    "conv_pooled: expected pooling to be 'max' or 'avg', got '", pooling, "'");
  const bool maximum = pooling == "max";
  const bool keeps = maximum && keep_places;
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

  const auto place_type = b.pool.place_bytes() == 1 ? at::kByte : at::kInt;
  const Tensor no_places = at::empty({0}, input.options().dtype(place_type));
  const Target target = planning() ? planned_target() : target_for(input);
  BlockPlan plan;
  if (is_cpu(target)) plan = plan_block(b, conv_lanes(target, b.conv.dtype));
  const bool too_few = !planning() && b.conv.n * plan.parts < context_for(input).threads;
  if (plan.path == BlockPlan::Path::sequence || too_few) {
    const Tensor whole = run_conv(conv);
    if (maximum) return max_of(std::move(pool), whole, keeps);
    return {mean_of(std::move(pool), whole), no_places};
  }
  const c10::DeviceGuard guard(input.device());
  Tensor y = empty_output(conv.x, pool.output_sizes, conv.format);
  Tensor places =
      keeps ? empty_output(conv.x, pool.output_sizes, place_type, conv.format) : no_places;
  if (planning())
    note(b, plan, keeps);
  else
    run_parts(b, plan, conv, y, keeps ? &places : nullptr);
  return {y, places};
}

[[maybe_unused]] const bool plans_registered = register_planned_ops({"conv_pooled"});

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def(
      "conv_pooled(Tensor input, Tensor weight, Tensor? bias, str activation, float slope, int[] "
      "stride, int[] padding, int[] dilation, int groups, str pooling, int[] pool_size, int[] "
      "pool_stride, int[] pool_padding, bool keep_places) -> (Tensor output, Tensor places)");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { m.impl("conv_pooled", conv_pooled); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { m.impl("conv_pooled", conv_pooled); }

}  // namespace weft
