// Pooling on CPU: the table of kernels. The maximum is in pool_max_cpu.cpp and
// pool_max_grad_cpu.cpp, the average in pool_avg_cpu.cpp, which path a problem takes in
// pool_plan.h.
#include "pool/pool_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Calls Kernel on the problem with adaptive windows made fixed where that is the same.
template <auto Kernel, class... Arguments>
void with_fixed_windows(const PoolProblem& p, Arguments... arguments) {
  Kernel(pool_with_fixed_windows(p), arguments...);
}

}  // namespace

const PoolKernels pool_kernels = {
    max_forward,
    with_fixed_windows<max_backward, const void*, const void*, void*, const Context&>,
    with_fixed_windows<max_pick, const void*, const void*, void*, const Context&>,
    with_fixed_windows<max_indices, const void*, int64_t*, const Context&>,
    with_fixed_windows<avg_forward, const void*, void*, const Context&>,
    with_fixed_windows<avg_backward, const void*, void*, const Context&>};

}  // namespace weft::WEFT_TARGET
