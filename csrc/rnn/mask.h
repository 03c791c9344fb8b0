// Random masks of zoneout: the same on every target.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

struct MaskProblem {
  DType dtype = DType::f32;
  int64_t count = 0;
  uint64_t threshold = 0;  // of 2^32: how many of so many elements are one
};

struct MaskKernels {
  // out [count] is one or zero, element i by the seed, which is where `out` is, and i alone.
  void (*draw)(const MaskProblem&, const int64_t* seed, void* out, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(MaskKernels, mask_kernels)

}  // namespace weft
