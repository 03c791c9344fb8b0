// Pooling on CPU: the table of kernels. The maximum is in pool_max_cpu.cpp and
// pool_max_grad_cpu.cpp, the average in pool_avg_cpu.cpp, which path a problem takes in
// pool_plan.h, planes of few positions in pool_lanes_cpu.cpp, few channels in pool_transposed.h.
// Adaptive windows are made fixed where that is the same.
#include "pool/pool_cpu.h"
#include "pool/pool_transposed.h"

namespace weft::WEFT_TARGET {
namespace {

PoolTensor reads(const void* address, int64_t positions, int64_t bytes) {
  return {address, nullptr, positions, bytes};
}
PoolTensor writes(void* address, int64_t positions, int64_t bytes) {
  return {nullptr, address, positions, bytes};
}

void max_forward_of(const PoolProblem& p, const void* x, void* y, void* places,
                    const Context& context) {
  if (pool_takes_lanes(p, places != nullptr)) return max_forward_in_lanes(p, x, y, places, context);
  if (!pool_transposes(p)) return max_forward(p, x, y, places, context);
  const int64_t bytes = size_of(p.dtype), in = p.in_positions(), out = p.out_positions();
  pool_transposed<3>(
      p, {reads(x, in, bytes), writes(y, out, bytes), writes(places, out, p.place_bytes())},
      context, [](const PoolProblem& q, void* const* at, const Context& alone) {
        max_forward(q, at[0], at[1], at[2], alone);
      });
}

void max_backward_of(const PoolProblem& p, const void* gy, const void* places, void* gx,
                     const Context& context) {
  max_backward(pool_with_fixed_windows(p), gy, places, gx, context);
}

// Averages forward and backward, from maps of `from` positions to maps of `to`.
template <auto Kernel>
void average(const PoolProblem& p, const void* x, int64_t from, void* y, int64_t to,
             const Context& context) {
  const PoolProblem fixed = pool_with_fixed_windows(p);
  if (!pool_transposes(p)) return Kernel(fixed, x, y, context);
  const int64_t bytes = size_of(p.dtype);
  pool_transposed<2>(fixed, {reads(x, from, bytes), writes(y, to, bytes)}, context,
                     [](const PoolProblem& q, void* const* at, const Context& alone) {
                       Kernel(q, at[0], at[1], alone);
                     });
}

void avg_forward_of(const PoolProblem& p, const void* x, void* y, const Context& context) {
  if (pool_takes_lanes(p)) return avg_forward_in_lanes(p, x, y, context);
  average<avg_forward>(p, x, p.in_positions(), y, p.out_positions(), context);
}
void avg_backward_of(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  if (pool_takes_lanes(p)) return avg_backward_in_lanes(p, gy, gx, context);
  average<avg_backward>(p, gy, p.out_positions(), gx, p.in_positions(), context);
}
void max_pick_of(const PoolProblem& p, const void* x, const void* places, void* y,
                 const Context& context) {
  max_pick(pool_with_fixed_windows(p), x, places, y, context);
}
void max_indices_of(const PoolProblem& p, const void* places, int64_t* indices,
                    const Context& context) {
  max_indices(pool_with_fixed_windows(p), places, indices, context);
}

}  // namespace

const PoolKernels pool_kernels = {max_forward_of, max_backward_of, max_pick_of,
                                  max_indices_of, avg_forward_of,  avg_backward_of};

}  // namespace weft::WEFT_TARGET
