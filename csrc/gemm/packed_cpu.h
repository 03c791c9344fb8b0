// The CPU tile product with one operand packed: C[m][n] = sum_k A[m][k] B[k][n].
//
// B is packed into panels of a few vectors of columns, k after k, zero beyond the last column,
// so that the inner loop reads it in one stream whatever B's strides are; products that use one B
// many times (a step of a recurrent layer, the rows of a large matrix) pay for that once. A tile is
// kTileRows x Vectors accumulators in registers; sums are made in runs (pack_cpu.h), each added in
// memory to those before it, which hides behind the next run's products, so their order depends on
// K alone. Bound: FLOPs. Lost: runs as calls of their own, of which 32 terms cost a tenth.
//
// Everything is in the accumulation type: half types are widened while they are packed, except
// where the processor has products of bf16 (pairs_cpu.h).
#pragma once

#include "core/simd.h"
#include "gemm/pack_cpu.h"
#include "gemm/pairs_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
constexpr int kTileAccumulators = 24;
#else
constexpr int kTileAccumulators = 12;
#endif
template <int Vectors>
constexpr int kTileRows = Vectors == 1 ? 12 : kTileAccumulators / Vectors;

// Products that are added up before their sums are stored: product i is of rows a[i * a_step + r],
// from their term `first` on, and of the panel that begins at panels[i].
template <class Acc>
struct PackedBatch {
  const Acc* const* a;
  int64_t a_step;
  const Acc* const* panels;
  int64_t count;
  int64_t first;
  int64_t k;  // terms of each product
};

// What becomes of a tile's sums: they are stored, or added to what is there.
template <class Acc>
struct JoinSums {
  bool add;
  Acc* const* out;  // of each row

  void skip(int64_t rows) { out += rows; }

  template <int Rows, int Vectors>
  WEFT_INLINE void finish(const Vec<Acc> (&sum)[Rows][Vectors]) const {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Acc* at = out[r] + v * kLanes<Acc>;
        store_vec(at, add ? load_vec(at) + sum[r][v] : sum[r][v]);
      }
    }
  }
};

// sum[r] += the products of row[r] and the panel over k; `kPairs`: of words instead of numbers, see
// pairs_cpu.h.
template <bool kPairs, int Rows, int Vectors, class V, class Acc>
WEFT_INLINE void add_terms(V (&sum)[Rows][Vectors], const Acc* const (&row)[Rows], const Acc* panel,
                           int64_t k) {
  // Sums are short: fewer turns, whose end the processor then foresees, are worth up to a fifth.
#pragma GCC unroll 4
  for (int64_t i = 0; i < k; ++i) {
    V value[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) value[v] = load_vec(panel + (i * Vectors + v) * kLanes<Acc>);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const auto scale = [&]() __attribute__((always_inline)) {
        if constexpr (kPairs) {
          return broadcast_word(row[r] + i);
        } else {
          return row[r][i];
        }
      }();
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (kPairs) {
          add_pairs(sum[r][v], scale, value[v]);
        } else {
          sum[r][v] += scale * value[v];
        }
      }
    }
  }
}

// Row r's sums are those over the batch and k of a[r][k] times the panel's row k; `to` takes them
// from registers. `kRuns`: of a single product, in runs, which JoinSums takes; else the batch is
// one run.
template <bool kPairs, bool kRuns, int Rows, int Vectors, class Acc, class Target>
__attribute__((noinline)) void packed_tile(const PackedBatch<Acc>& batch, Target to) {
  using V = Vec<Acc>;
  const Acc* row[Rows];
  const auto point = [&](int64_t product) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) row[r] = batch.a[product * batch.a_step + r] + batch.first;
  };
  if constexpr (kRuns) {
    point(0);
    const Acc* panel = batch.panels[0];
    const int64_t run = run_length(batch.k);
    int64_t left = batch.k;
    do {  // no terms: zeros
      V sum[Rows][Vectors] = {};
      add_terms<kPairs>(sum, row, panel, left < run ? left : run);
      to.finish(sum);
      to.add = true;
      panel += run * Vectors * kLanes<Acc>;
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) row[r] += run;
      left -= run;
    } while (left > 0);
  } else {
    V sum[Rows][Vectors] = {};
    for (int64_t product = 0; product < batch.count; ++product) {
      point(product);
      add_terms<kPairs>(sum, row, batch.panels[product], batch.k);
    }
    to.finish(sum);
  }
}

template <bool kPairs, bool kRuns, int Rows, int Vectors, class Acc, class Target>
WEFT_INLINE void packed_tile_of(int rows, const PackedBatch<Acc>& batch, const Target& to) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return packed_tile_of<kPairs, kRuns, Rows - 1, Vectors>(rows, batch, to);
  }
  packed_tile<kPairs, kRuns, Rows, Vectors>(batch, to);
}

// A batch for any number of rows, cut into tiles of nearly equal height.
template <int Vectors, bool kPairs, bool kRuns = false, class Acc, class Target>
void packed_batch(PackedBatch<Acc> batch, int64_t rows, Target to) {
  constexpr int kMost = kTileRows<Vectors>;
  while (rows > 0) {
    const int64_t tiles = (rows + kMost - 1) / kMost;
    const auto take = static_cast<int>((rows + tiles - 1) / tiles);
    packed_tile_of<kPairs, kRuns, kMost, Vectors>(take, batch, to);
    batch.a += take, rows -= take;
    to.skip(take);
  }
}

// One product of any number of rows, k in numbers or words: out[r] = (add ? out[r] : 0) + the
// products of a[r] and the panel.
template <int Vectors, bool kPairs = false, class Acc>
void packed_rows(const Acc* const* a, int64_t rows, const Acc* panel, int64_t k, bool add,
                 Acc* const* out) {
  packed_batch<Vectors, kPairs, true>(PackedBatch<Acc>{a, 0, &panel, 1, 0, k}, rows,
                                      JoinSums<Acc>{add, out});
}

// True if panels of three vectors hold `columns` in less than panels of four do.
template <class T>
constexpr bool fewer_lanes_with_three(int64_t columns) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  return (vectors + 2) / 3 * 3 < (vectors + 3) / 4 * 4;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
