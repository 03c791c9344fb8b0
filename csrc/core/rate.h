// How fast this processor multiplies and adds: what bounds every product that is made on it.
#pragma once

#include <cstdint>

#include "core/context.h"

namespace weft {

struct RateKernels {
  // Does `rounds` rounds of float32 multiply-adds in registers on each thread; returns how many
  // operations that were, a multiply-add being two.
  int64_t (*multiply_adds)(int64_t rounds, const Context&);
};

WEFT_DECLARE_CPU_KERNEL_TABLES(RateKernels, rate_kernels)

}  // namespace weft
