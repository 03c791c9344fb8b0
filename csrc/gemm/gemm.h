// A matrix product as plain data.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

// C [m, n] = A [m, k] B [k, n]; B and C contiguous, A(i, j) at i * a_row + j * a_column.
struct ProductProblem {
  DType dtype = DType::f32;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t a_row = 0;
  int64_t a_column = 0;
};

// C [m, n] = A [m, k] B [k, n], any strides of A and B; C's columns are neighbours.
struct PackedProblem {
  DType dtype = DType::f32;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t a_row = 0;
  int64_t a_column = 0;
  int64_t b_row = 0;
  int64_t b_column = 0;
  int64_t c_row = 0;
  bool wide = false;  // C is of the accumulation type
};

struct GemmKernels {
  // c [m, n] = product (+ add [m, n] if that is not null).
  void (*product)(const ProductProblem&, const void* a, const void* b, const void* add, void* c,
                  const Context&);
  // For large products: packs B. `c` must not overlap a or b.
  void (*packed)(const PackedProblem&, const void* a, const void* b, void* c, const Context&);
  // sums [n] = the sum of the rows of b [k, n]; of the problem, dtype, n and k are read.
  void (*column_sums)(const ProductProblem&, const void* b, void* sums, const Context&);
};

// CPU targets only: on CUDA torch's own matrix products give the same bits on every run.
WEFT_DECLARE_CPU_KERNEL_TABLES(GemmKernels, gemm_kernels)

}  // namespace weft
