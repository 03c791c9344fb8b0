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

// The gradients of weights: A^T B of A [k, m], whose rows are a_row apart, and contiguous factors
// B [k, n]; k is at least 1.
struct GradientProblem {
  DType dtype = DType::f32;
  int64_t m = 0;
  int64_t k = 0;
  int64_t a_row = 0;
};
// B's first rows lie apart from the others; there is a whole number of pairs of them where a half
// type is multiplied. No columns: no factor.
struct GradientFactor {
  int64_t n = 0;
  int64_t head_rows = 0;
  const void* head = nullptr;  // [head_rows, n]
  const void* tail = nullptr;  // [k - head_rows, n]
  void* gradient = nullptr;    // [m, n]
};

// Rows of A and B whose copies are made at once, of pairs twice as many.
inline constexpr int64_t kGradientRows = 512;

// The most lanes of a vector, and columns of A in a strip, of any target.
inline constexpr int64_t kMostLanes = 16;

// Numbers that the copies of A's `m` columns take at most: strips of a few more numbers than their
// columns have, the last one of full size too.
constexpr int64_t gradient_strip_numbers(int64_t m) {
  return (m + kMostLanes - 1) * kGradientRows + m * kMostLanes;
}

// Bytes of work memory that serve every target.
constexpr int64_t gradient_work(const GradientProblem& p, int64_t n_first, int64_t n_second) {
  const auto padded = [](int64_t n) { return (n + kMostLanes - 1) / kMostLanes * kMostLanes; };
  const int64_t columns = padded(n_first) + padded(n_second);
  const int64_t waiting = size_of(p.dtype) < 4 ? padded(p.m) * columns : 0;
  return (2 * columns * kGradientRows + gradient_strip_numbers(p.m) + waiting) *
         (p.dtype == DType::f64 ? 8 : 4);
}

struct GemmKernels {
  // c [m, n] = product (+ add [m, n] if that is not null).
  void (*product)(const ProductProblem&, const void* a, const void* b, const void* add, void* c,
                  const Context&);
  // For large products: packs B. `c` must not overlap a or b.
  void (*packed)(const PackedProblem&, const void* a, const void* b, void* c, const Context&);
  // `work`: gradient_work bytes, aligned for vectors.
  void (*weight_gradients)(const GradientProblem&, const void* a, const GradientFactor (&)[2],
                           void* work, const Context&);
  // sums [n] = the sum of the rows of b [k, n]; of the problem, dtype, n and k are read.
  void (*column_sums)(const ProductProblem&, const void* b, void* sums, const Context&);
};

// CPU targets only: on CUDA torch's own matrix products give the same bits on every run.
WEFT_DECLARE_CPU_KERNEL_TABLES(GemmKernels, gemm_kernels)

}  // namespace weft
