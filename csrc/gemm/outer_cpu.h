// The CPU tile product whose sum runs over rows of B: C[m][n] = add[m][n] + sum_k A(m, k) B[k][n].
//
// A is addressed by two strides, so it serves both gradients of a linear layer as they lie: of its
// input (gradient times weights) and of its weights (gradient transposed times input). Nothing is
// packed: rows x vectors accumulators stay in registers, a step loads one row's vectors of B and
// broadcasts elements of A. Sums are made in runs (pack_cpu.h), which are then added up: less error
// than one long sum, and an order that depends on K alone. Bound: FLOPs while a panel of B stays in
// the cache; for few rows of B, the bytes of C; for few rows of C, the bytes of B, so there panels
// are wide, which also hides the latency of the sums.
//
// Lost: torch's mm, whose bits depend on the number of threads; starting the sum at `add` instead
// of adding it last, which rounds every term at the size of `add`.
#pragma once

#include "core/parallel.h"
#include "core/simd.h"
#include "core/window.h"
#include "gemm/gemm.h"
#include "gemm/pack_cpu.h"
#include "gemm/panel_cpu.h"

namespace weft::WEFT_TARGET {

template <class T>
struct OuterProduct {
  using V = Vec<accumulate_t<T>>;
  static constexpr int kLane = kLanes<T>;
#if defined(__AVX512F__)
  static constexpr int kRows = 8, kVectors = 3, kWide = 8;
#else
  static constexpr int kRows = 4, kVectors = 3, kWide = 6;
#endif
  static constexpr int64_t kFewRows = 2;      // of C: panels of kWide vectors
  static constexpr int64_t kSmall = 1 << 16;  // elements of a B that stays in the cache
  static constexpr int kFewTerms = 4;         // for which C goes row by row
  static constexpr int64_t kTiny = 1 << 12;   // elements of a B that stays in the first-level cache

  const ProductProblem& p;
  const T* a;
  const T* b;
  const T* add;
  T* c;

  // Rows [row, row + Rows) and columns [column, column + Vectors * kLane), cut off at p.n. A vector
  // that would pass the end begins earlier, and stores only what no other vector does.
  template <int Rows, int Vectors>
  WEFT_INLINE void tile(int64_t row, int64_t column) const {
    const bool whole = column + Vectors * kLane <= p.n;
    const int narrow_count = p.n < kLane ? static_cast<int>(p.n) : 0;
    int64_t first[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t begin = column + v * kLane;
      first[v] = whole || begin + kLane <= p.n ? begin : narrow_count ? 0 : p.n - kLane;
    }
    const auto add_run = [&](int64_t begin, int64_t end,
                             V(&sum)[Rows][Vectors]) __attribute__((always_inline)) {
      const auto walk = [&](auto load) __attribute__((always_inline)) {
        for (int64_t k = begin; k < end; ++k) {
          V value[Vectors];
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) value[v] = load(b + first[v] + k * p.n);
#pragma GCC unroll 8
          for (int r = 0; r < Rows; ++r) {
            const auto scale = widen(a[(row + r) * p.a_row + k * p.a_column]);
#pragma GCC unroll 8
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
    };
    V total[Rows][Vectors] = {};
    const int64_t run = run_length(p.k);
    add_run(0, p.k < run ? p.k : run, total);
    for (int64_t begin = run; begin < p.k; begin += run) {
      V sum[Rows][Vectors] = {};
      add_run(begin, begin + run < p.k ? begin + run : p.k, sum);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) total[r][v] += sum[r][v];
      }
    }
    const int64_t corner = row * p.n + column;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const int64_t target = corner + r * p.n + v * kLane;
        if (whole || column + (v + 1) * kLane <= p.n) {
          store_vec(c + target, add ? total[r][v] + load_vec(add + target) : total[r][v]);
        } else {
          finish_part(total[r][v], (row + r) * p.n, first[v], column + v * kLane);
        }
      }
    }
  }

  // Stores columns [begin, p.n) of a vector whose first lane is column `first`.
  __attribute__((noinline)) void finish_part(V value, int64_t target, int64_t first,
                                             int64_t begin) const {
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
    if constexpr (Vectors <= kVectors) {
      for (; row + kRows <= end; row += kRows) tile<kRows, Vectors>(row, column);
      for (; row + 4 <= end; row += 4) tile<4, Vectors>(row, column);
    }
    for (; row + 2 <= end; row += 2) tile<2, Vectors>(row, column);
    if (row < end) tile<1, Vectors>(row, column);
  }

  template <int Vectors>
  void panel_of(int vectors, int64_t row, int64_t end, int64_t column) const {
    if constexpr (Vectors > 1) {
      if (vectors < Vectors) return panel_of<Vectors - 1>(vectors, row, end, column);
    }
    rows_of_panel<Vectors>(row, end, column);
  }

  // Rows [row, end) of C as sums of Terms terms, row by row: the gradients of a cell's weights for
  // a few rows. Bound: the bytes of C. The same bits as tiles.
  template <int Terms>
  void rows_of_few(int64_t row, int64_t end) const {
    const int64_t n = p.n;
    for (; row < end; ++row) {
      accumulate_t<T> scale[Terms];
#pragma GCC unroll 4
      for (int k = 0; k < Terms; ++k) scale[k] = widen(a[row * p.a_row + k * p.a_column]);
      for (int64_t column = 0; column < n; column += kLane) {
        const int count = n - column < kLane ? static_cast<int>(n - column) : kLane;
        V sum = {};
#pragma GCC unroll 4
        for (int k = 0; k < Terms; ++k) sum += scale[k] * load_columns(b + k * n + column, count);
        if (add) sum += load_columns(add + row * n + column, count);
        store_columns(c + row * n + column, sum, count);
      }
    }
  }

  template <int Terms = kFewTerms>
  void few_terms(int64_t row, int64_t end) const {
    if constexpr (Terms > 1) {
      if (p.k < Terms) return few_terms<Terms - 1>(row, end);
    }
    rows_of_few<Terms>(row, end);
  }

  // Threads take runs of (panel, group of rows): where B is large, panels outermost, so that one
  // thread reads a panel for all its groups; else groups, so that rows of C are written in one go.
  // Panels are of nearly equal width.
  void run(const Context& context, int64_t grain) const {
    if (p.m > kFewRows && p.k > 0 && p.k <= kFewTerms && p.k * p.n <= kTiny)
      return parallel_for(context, p.m, ceil_div(grain, p.n * p.k + 1),
                          [&](int64_t begin, int64_t end) { few_terms(begin, end); });
    constexpr int64_t kGroup = 4 * kRows;
    const bool few = p.m <= kFewRows;
    const int64_t most = few ? kWide : kVectors;
    const int64_t vectors = ceil_div(p.n, kLane), panels = ceil_div(vectors, most);
    const int64_t groups = ceil_div(p.m, kGroup);
    const bool small = p.k * p.n <= kSmall;
    const int64_t work = (p.m < kGroup ? p.m : kGroup) * most * kLane * p.k + 1;
    parallel_for(context, groups * panels, ceil_div(grain, work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = (small ? i / panels : i % groups) * kGroup;
        const int64_t panel = small ? i % panels : i / groups;
        const int64_t last = row + kGroup < p.m ? row + kGroup : p.m;
        const int64_t from = vectors * panel / panels, to = vectors * (panel + 1) / panels;
        const auto count = static_cast<int>(to - from);
        if (few) {
          panel_of<kWide>(count, row, last, from * kLane);
        } else {
          panel_of<kVectors>(count, row, last, from * kLane);
        }
      }
    });
  }
};

}  // namespace weft::WEFT_TARGET
