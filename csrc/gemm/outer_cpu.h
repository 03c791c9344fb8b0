// The CPU tile product whose sum runs over rows of B: C[m][n] = add[m][n] + sum_k A(m, k) B[k][n].
//
// A is addressed by two strides, so it serves both gradients of a linear layer as they lie: of its
// input (gradient times weights) and of its weights (gradient transposed times input). Nothing is
// packed: kRows x kVectors accumulators stay in registers, a step loads kVectors vectors of one row
// of B and broadcasts kRows elements of A. Sums are made in blocks of kBlock terms, which are then
// added up: less error than one long sum, and an order that depends on K alone. Bound: FLOPs while
// a panel of B (K rows of kVectors vectors) stays in the cache; for few rows of B, the bytes of C.
#pragma once

#include "core/parallel.h"
#include "core/simd.h"
#include "core/window.h"
#include "gemm/gemm.h"

namespace weft::WEFT_TARGET {

template <class T>
struct OuterProduct {
  using V = Vec<accumulate_t<T>>;
  static constexpr int kLane = kLanes<T>;
#if defined(__AVX512F__)
  static constexpr int kRows = 8, kVectors = 3;
#else
  static constexpr int kRows = 4, kVectors = 3;
#endif
  static constexpr int64_t kPanel = kVectors * kLane;
  static constexpr int64_t kBlock = 64;

  const ProductProblem& p;
  const T* a;
  const T* b;
  const T* add;
  T* c;

  // Rows [row, row + Rows) and columns [column, column + Vectors * kLane), cut off at p.n. A vector
  // that would pass the end begins earlier, and stores only what no other vector does.
  template <int Rows, int Vectors>
  WEFT_INLINE void tile(int64_t row, int64_t column) const {
    const T* at[Vectors];
    int64_t first[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64_t begin = column + v * kLane;
      first[v] = begin + kLane <= p.n ? begin : (p.n >= kLane ? p.n - kLane : 0);
      at[v] = b + first[v];
    }
    const int narrow_count = p.n < kLane ? static_cast<int>(p.n) : 0;
    V total[Rows][Vectors] = {};
    for (int64_t block = 0; block < p.k; block += kBlock) {
      const int64_t end = block + kBlock < p.k ? block + kBlock : p.k;
      V sum[Rows][Vectors] = {};
      const auto walk = [&](auto load) __attribute__((always_inline)) {
        for (int64_t k = block; k < end; ++k) {
          V value[Vectors];
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) value[v] = load(at[v] + k * p.n);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const auto scale = widen(a[(row + r) * p.a_row + k * p.a_column]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[r][v] += scale * value[v];
          }
        }
      };
      if (narrow_count == 0) {
        walk([](const T* address) __attribute__((always_inline)) { return load_vec(address); });
      } else {
        walk([&](const T* address)
                 __attribute__((always_inline)) { return load_part(address, narrow_count); });
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) total[r][v] += sum[r][v];
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        const int64_t begin = column + v * kLane;
        const int64_t count = p.n - begin < kLane ? p.n - begin : kLane;
        const int64_t target = (row + r) * p.n;
        if (count == kLane) {
          V value = total[r][v];
          if (add) value += load_vec(add + target + begin);
          store_vec(c + target + begin, value);
        } else {
          finish_part(total[r][v], target, first[v], begin);
        }
      }
    }
  }

  // Stores columns [begin, p.n) of a vector whose first lane is column `first`.
  WEFT_INLINE void finish_part(V value, int64_t target, int64_t first, int64_t begin) const {
    accumulate_t<T> lanes[kLane];
    store_vec(lanes, value);
    for (int64_t column = begin; column < p.n; ++column) {
      accumulate_t<T> sum = lanes[column - first];
      if (add) sum += widen(add[target + column]);
      c[target + column] = narrow<T>(sum);
    }
  }

  template <int Vectors>
  void rows_of_panel(int64_t row, int64_t end, int64_t column) const {
    for (; row + kRows <= end; row += kRows) tile<kRows, Vectors>(row, column);
    for (; row < end; ++row) tile<1, Vectors>(row, column);
  }

  void panel(int64_t row, int64_t end, int64_t column) const {
    const int64_t left = p.n - column;
    if (left > 2 * kLane) return rows_of_panel<3>(row, end, column);
    if (left > kLane) return rows_of_panel<2>(row, end, column);
    rows_of_panel<1>(row, end, column);
  }

  // Threads take runs of (panel, group of rows), panels outermost: a panel of B is read by one
  // thread for all its groups.
  void run(const Context& context, int64_t grain) const {
    constexpr int64_t kGroup = 4 * kRows;
    const int64_t groups = ceil_div(p.m, kGroup);
    const int64_t work = kGroup * kPanel * p.k + 1;
    parallel_for(context, groups * ceil_div(p.n, kPanel), ceil_div(grain, work),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t row = i % groups * kGroup;
                     const int64_t last = row + kGroup < p.m ? row + kGroup : p.m;
                     panel(row, last, i / groups * kPanel);
                   }
                 });
  }
};

}  // namespace weft::WEFT_TARGET
