// Random masks of zoneout, drawn on the CPU.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

struct MaskProblem {
  DType dtype = DType::f32;
  int64_t count = 0;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // of 2^32: how many of so many elements are one
};

struct MaskKernels {
  // out [count] is one or zero, element i by the seed and i alone.
  void (*draw)(const MaskProblem&, void* out, const Context&);
};

// CPU targets only: on CUDA torch's own generator is as fast as memory.
WEFT_DECLARE_CPU_KERNEL_TABLES(MaskKernels, mask_kernels)

}  // namespace weft
