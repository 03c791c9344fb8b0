// The table of pooling's CUDA kernels. How a problem runs is chosen in pool_plan_cuda.h.
#include "pool/pool_cuda.h"

namespace weft::WEFT_TARGET {

const PoolKernels pool_kernels = {launch_max_forward, launch_max_backward, launch_max_pick,
                                  launch_max_indices, launch_avg_forward,  launch_avg_backward};

}  // namespace weft::WEFT_TARGET
