// The op that draws a mask.
#include "ops_common.h"
#include "rnn/mask.h"

#include <c10/core/DeviceGuard.h>

#include <cmath>

namespace weft {
namespace {

using at::Tensor;

Tensor random_mask(const Tensor& seed, const Tensor& like, at::IntArrayRef size, double p) {
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1,
              "weft::random_mask: seed must be one int64, got ", seed.sizes(), " of dtype ",
              toString(seed.scalar_type()));
  TORCH_CHECK(seed.device() == like.device(), "weft::random_mask: seed is on ", seed.device(),
              ", like on ", like.device());
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "weft::random_mask: p must be between 0 and 1, got ", p);
  const c10::DeviceGuard guard(like.device());
  Tensor result = empty_output(like, size);
  MaskProblem problem;
  problem.dtype = dtype_of(like, "random_mask", "like");
  problem.count = result.numel();
  problem.threshold = static_cast<uint64_t>(std::llround(std::ldexp(p, 32)));
  if (problem.count > 0)
    kernels_for(like, mask_kernels_for)
        .draw(problem, seed.const_data_ptr<int64_t>(), result.mutable_data_ptr(),
              context_for(like));
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) {
  m.def("random_mask(Tensor seed, Tensor like, SymInt[] size, float p) -> Tensor");
}

TORCH_LIBRARY_IMPL(weft, CPU, m) { m.impl("random_mask", random_mask); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { m.impl("random_mask", random_mask); }

}  // namespace weft
