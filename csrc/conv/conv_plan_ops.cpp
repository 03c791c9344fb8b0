// What the convolution ops tell of themselves where plans are asked for.
#include "conv/conv_depthwise_plan.h"
#include "conv/conv_ops.h"
#include "conv/conv_wgmma_plan.h"
#include "ops_common.h"

namespace weft {
namespace {

// The launch that adds the partial sums of a weight gradient.
void note_wgrad_sum(const ConvProblem& p, int64_t splits, int64_t workspace) {
  Plan sum;
  sum.kernel = "conv_wgrad_sum";
  sum.path = "sum of splits";
  sum.threads = 256;
  sum.blocks = ceil_div(p.weight_elements(), sum.threads);
  sum.flops = splits * p.weight_elements();
  sum.bytes = sum.least_bytes = workspace + p.weight_elements() * size_of(p.dtype);
  note_plan(std::move(sum));
}

void note_depthwise(const ConvProblem& p, ConvProduct product, const DepthwisePlan& tiles,
                    Plan plan) {
  constexpr const char* kSteps[] = {"fprop", "dgrad", "wgrad"};
  plan.kernel = p.c * p.k > 1 ? "conv_grouped_" : "conv_depthwise_";
  plan.kernel += kSteps[static_cast<int>(product)];
  plan.path = "tile";
  plan.tile = {{"n", tiles.images},
               {"g", tiles.groups},
               {"d", tiles.extent[0]},
               {"h", tiles.extent[1]},
               {"w", tiles.extent[2]}};
  plan.blocks =
      tiles.chunks * (product == ConvProduct::wgrad ? int64_t{tiles.splits} : tiles.tiles);
  plan.threads = depthwise_plan::kThreads;
  plan.shared_bytes = tiles.bytes;
  note_plan(std::move(plan));
  if (tiles.splits > 1) note_wgrad_sum(p, tiles.splits, wgrad_workspace(p, tiles));
}

// Adds what CUDA would launch.
void note_cuda(const ConvProblem& p, ConvStep step, Plan plan) {
  const ConvWalk walk = conv_walk(p, step);
  plan.path = "walk";
  plan.blocks = walk.blocks;
  plan.threads = walk.threads;
  plan.shared_bytes = walk.shared_bytes;
  if (step == ConvStep::bias_grad) return note_plan(std::move(plan));
  const ConvProduct product = step == ConvStep::fprop   ? ConvProduct::fprop
                              : step == ConvStep::dgrad ? ConvProduct::dgrad
                                                        : ConvProduct::wgrad;
  if (const DepthwisePlan tiles = plan_depthwise(p, product); tiles.tiled)
    return note_depthwise(p, product, tiles, std::move(plan));
  if (const ConvWgmmaPlan tiles = plan_conv_wgmma(p, product); sm90a_kernels() && tiles.fits) {
    plan.kernel += "_wgmma";
    plan.path = "product of warpgroups";
    plan.tile = {{"m", conv_wgmma::kRows}, {"n", tiles.columns}, {"k", conv_wgmma::kDepth}};
    plan.blocks = tiles.blocks();
    plan.threads = conv_wgmma::kThreads;
    plan.shared_bytes = conv_wgmma::shared_bytes(tiles.columns);
    plan.launches = tiles.launches;
    note_plan(std::move(plan));
    if (step == ConvStep::wgrad)
      note_wgrad_sum(p, tiles.splits, tiles.splits * p.weight_elements() * 4);
    return;
  }
  const ConvCudaPlan cuda = plan_conv_cuda(p, product);
  if (cuda.path == ConvCudaPlan::Path::walk) return note_plan(std::move(plan));
  plan.kernel += "_product";
  plan.path = cuda.plain ? "product" : "product on tensor cores";
  plan.tile = {{"m", cuda.tile.m}, {"n", cuda.tile.n}, {"k", cuda.tile.k}};
  plan.blocks = cuda.blocks;
  plan.threads = cuda.tile.threads();
  plan.shared_bytes = cuda.shared_bytes;
  plan.launches = cuda.launches;
  note_plan(std::move(plan));
  if (step == ConvStep::wgrad) note_wgrad_sum(p, cuda.splits, wgrad_workspace(p, cuda));
}

void note(const ConvProblem& p, ConvStep step) {
  Plan plan;
  plan.kernel = name_of(step);
  plan.flops = conv_flops(p, step);
  plan.bytes = plan.least_bytes = conv_least_bytes(p, step);
  const Target target = planned_target();
  if (!is_cpu(target)) return note_cuda(p, step, std::move(plan));
  if (step == ConvStep::bias_grad) {
    plan.path = p.channels_last ? "pixels" : "planes";
    return note_plan(std::move(plan));
  }
  const int64_t lanes = conv_lanes(target, p.dtype);
  const ConvPath path = step == ConvStep::wgrad ? conv_wgrad_path(p, lanes)
                        : step == ConvStep::backward
                            ? conv_backward_path(p, lanes)
                            : conv_gather_path(p, step == ConvStep::dgrad, lanes);
  plan.path = name_of(path);
  plan.bytes = conv_bytes(p, step, path);
  if (path == ConvPath::column_tiles) plan.flops = column_tiles::operations(p);
  if (path == ConvPath::winograd) plan.flops = winograd::operations(p, step == ConvStep::dgrad);
  note_plan(std::move(plan));
}

[[maybe_unused]] const bool plans_registered = register_planned_ops(
    {"conv", "conv_activated", "conv_dgrad", "conv_wgrad", "conv_bias_grad", "conv_backward"});

}  // namespace

bool conv_planned(const ConvProblem& p, ConvStep step) {
  if (!planning()) return false;
  note(p, step);
  return true;
}

}  // namespace weft
