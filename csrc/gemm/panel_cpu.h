// What the packed products on CPU (gemm_cpu.cpp, gradient_cpu.cpp) share: how the columns of B are
// cut into panels, how operands lie when they are packed, and what becomes of a tile of C.
#pragma once

#include "core/scratch.h"
#include "core/window.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Numbers of a row that are copied at once, and whose sums are made before they go to C.
constexpr int64_t kDepth = 512;

// The columns of B in panels of nearly equal width, of four vectors at most, wide ones first.
struct PanelCut {
  int64_t panels, width, wider;

  explicit PanelCut(int64_t vectors)
      : panels(ceil_div(vectors, int64_t{4})),
        width(panels > 0 ? vectors / panels : 0),
        wider(vectors - width * panels) {}
  int vectors(int64_t panel) const { return static_cast<int>(width + (panel < wider ? 1 : 0)); }
  // The first vector of a panel.
  int64_t first(int64_t panel) const { return width * panel + (panel < wider ? panel : wider); }
  int64_t all_vectors() const { return first(panels); }
};

template <class T>
WEFT_INLINE Vec<accumulate_t<T>> load_columns(const T* address, int count) {
  return count == kLanes<T> ? load_vec(address) : load_part(address, count);
}
template <class T, class V>
WEFT_INLINE void store_columns(T* address, V value, int count) {
  if (count == kLanes<T>) return store_vec(address, value);
  store_part(address, value, count);
}

// How packed operands lie: numbers of the accumulation type, or words of two bf16.
struct Widened {
  static constexpr bool kPairs = false;
  static constexpr int64_t kTerms = 1;  // in a number of a packed operand

  // Terms [0, k) of one vector of columns.
  template <class T>
  static void pack(const T* b, int64_t k_stride, int64_t stride, int64_t count, int64_t k,
                   int vectors, accumulate_t<T>* panel) {
    pack_vector(b, k_stride, stride, count, k, vectors, panel);
  }
  // Of a matrix whose rows are `stride` apart, term `term` of `count` neighbouring columns.
  template <class T>
  static WEFT_INLINE Vec<accumulate_t<T>> load_row(const T* b, int64_t stride, int64_t term,
                                                   int64_t, int64_t count) {
    return load_columns(b + term * stride, static_cast<int>(count < kLanes<T> ? count : kLanes<T>));
  }
  // Terms [0, k) of rows of A, to rows of kDepth.
  template <class T>
  static void copy(const T* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                   accumulate_t<T>* out) {
    if (row_stride == 1) {
      for (int64_t i = 0; i < k; i += kLanes<T>)
        copy_transposed(a + i * k_stride, k_stride, k - i, rows, out + i, kDepth);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = a + r * row_stride;
      int64_t i = 0;
      for (; k_stride == 1 && i + kLanes<T> <= k; i += kLanes<T>)
        store_vec(out + r * kDepth + i, load_vec(from + i));
      for (; i < k; ++i) out[r * kDepth + i] = widen(from[i * k_stride]);
    }
  }
};

#if defined(__AVX512F__)
struct Paired {
  static constexpr bool kPairs = true;
  static constexpr int64_t kTerms = 2;

  static void pack(const bf16* b, int64_t k_stride, int64_t stride, int64_t count, int64_t k,
                   int vectors, float* panel) {
    pack_pairs(b, k_stride, stride, count, k, vectors, panel);
  }
  static WEFT_INLINE Vec<float> load_row(const bf16* b, int64_t stride, int64_t term, int64_t k,
                                         int64_t count) {
    return pair_rows(b, stride, term, k, count);
  }
  static void copy(const bf16* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                   float* out) {
    copy_pairs(a, row_stride, k_stride, rows, k, out, kDepth);
  }
};
#endif

// Some rows of C at one panel, and one block of terms.
template <class T, class C>
struct PanelOfC {
  using Acc = accumulate_t<T>;

  C* out;
  const T* more;  // to be added, or null
  int64_t out_row;
  Acc* waiting;  // sums of earlier blocks, and for later ones
  int64_t waiting_row;
  bool begun, complete;  // there are earlier blocks; there are no later ones
  int64_t runs;          // of a sum
  int64_t columns;       // of C, from the panel's first on
  Acc* held;             // a tile's sums, in the first-level cache

  bool plain(int64_t width) const {
    return std::is_same_v<C, Acc> && columns >= width && !begun && complete && more == nullptr;
  }
  // Rows of a tile that are held.
  __attribute__((noinline)) void put(int64_t row, int rows, int vectors) const {
    constexpr int64_t kLane = kLanes<T>;
    for (int r = 0; r < rows; ++r)
      for (int64_t column = 0; column < vectors * kLane && column < columns; column += kLane) {
        const int64_t left = columns - column;
        const int count = static_cast<int>(left < kLane ? left : kLane);
        auto sum = load_vec(held + r * vectors * kLane + column);
        Acc* wait = waiting + (row + r) * waiting_row + column;
        const int64_t at = (row + r) * out_row + column;
        if (begun) sum += load_columns(wait, count);
        if (!complete) {
          store_columns(wait, sum, count);
          continue;
        }
        if (more) sum += load_columns(more + at, count);
        store_columns(out + at, sum, count);
      }
  }
};

// A tile of it, which takes its sums from registers (packed_cpu.h) run by run. Rows of C are far
// apart, so what the last run will write is fetched while the others are made.
template <class T, class C>
struct TileOfC {
  const PanelOfC<T, C>& panel;
  int64_t row = 0;
  int64_t run = 0;
  bool add = false;
  int fetched = 0;

  void skip(int64_t rows) { row += rows; }

  template <int Rows, int Vectors>
  WEFT_INLINE void finish(Vec<accumulate_t<T>> (&sum)[Rows][Vectors]) {
    constexpr int64_t kLane = kLanes<T>, kWidth = Vectors * kLane;
    C* out = panel.out + row * panel.out_row;
    const bool last = ++run == panel.runs, direct = last && panel.plain(kWidth);
    if (!last) {
      for (int i = 0; i < 2 && fetched < Rows; ++i, ++fetched)
        for (int v = 0; v < Vectors; ++v)
          __builtin_prefetch(out + fetched * panel.out_row + v * kLane, 1);
    }
    if (run > 1) {
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
          sum[r][v] += load_vec(panel.held + r * kWidth + v * kLane);
      }
    }
    if constexpr (std::is_same_v<C, accumulate_t<T>>) {
      if (direct) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v)
            store_vec(out + r * panel.out_row + v * kLane, sum[r][v]);
        }
        return;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) store_vec(panel.held + r * kWidth + v * kLane, sum[r][v]);
    }
    if (last) panel.put(row, Rows, Vectors);
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
