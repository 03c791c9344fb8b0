// The CUDA launchers of pooling, one file of kernels each for averages, maxima and their inverses.
#pragma once

#include "device/grid.h"
#include "pool/pool.h"
#include "pool/pool_plan_cuda.h"

namespace weft::WEFT_TARGET {

void launch_max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                        const Context& context);
void launch_max_backward(const PoolProblem& p, const void* gy, const void* places, void* gx,
                         const Context& context);
// By a plan of strips; part of the former.
void launch_max_backward_columns(const PoolProblem& p, const PoolPlan& plan, const void* gy,
                                 const void* places, void* gx, const Context& context);
void launch_max_pick(const PoolProblem& p, const void* x, const void* places, void* y,
                     const Context& context);
void launch_max_indices(const PoolProblem& p, const void* places, int64_t* indices,
                        const Context& context);
void launch_avg_forward(const PoolProblem& p, const void* x, void* y, const Context& context);
void launch_avg_backward(const PoolProblem& p, const void* gy, void* gx, const Context& context);

namespace {

inline device::Launch launch_of(const char* kernel, const PoolPlan& plan, const Context& context) {
  return {kernel, plan.blocks, plan.threads, plan.shared_bytes, context.stream};
}

// The plan for the device at hand; its facts are asked for where the plan depends on them.
inline PoolPlan plan_here(const PoolProblem& p, PoolStep step) {
  PoolPlan plan = plan_pool(p, step);
  if (plan.shared_bytes <= pool_plan::kSharedAnywhere) return plan;
  DeviceFacts facts;
  facts.shared_bytes = std::clamp(device::grid_facts().block_shared_bytes,
                                  pool_plan::kSharedAnywhere, facts.shared_bytes);
  return plan_pool(p, step, facts);
}

// Calls `body(Place{})` with the integer that holds a place.
template <class Body>
void dispatch_place(const PoolProblem& p, const Body& body) {
  if (p.place_bytes() == 1) return body(uint8_t{});
  return body(uint32_t{});
}

}  // namespace
}  // namespace weft::WEFT_TARGET
