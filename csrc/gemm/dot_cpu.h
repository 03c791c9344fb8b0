// The CPU tile product for two operands whose rows run along K: C[m][r] = sum_k A[m][k] * B[r][k].
//
// That is the layout of a linear layer (activations [M, K], weights [R, K]), so nothing is packed
// or transposed: M x R vector accumulators run along K, each loaded vector of B serves M rows, each
// of A serves R, and one tree of shuffles folds all accumulators at the end. The sum's order
// depends on K and the vector width alone, never on a tile's shape or place, so results do not
// depend on how a problem is cut into tiles. Bound: FLOPs while A and the tile's rows of B stay in
// the cache.
#pragma once

#include <utility>

#include "core/simd.h"
#include "gemm/pairs_cpu.h"

namespace weft::WEFT_TARGET {

// Which accumulator column each of a tile's R rows of B adds to.
template <int R>
struct Columns {
  int at[R];
};

namespace detail {

template <class V>
inline constexpr int kWidth = static_cast<int>(sizeof(V) / sizeof(V{}[0]));

// Zero except in the last `count` lanes.
template <class V>
WEFT_INLINE V keep_last(V value, int count) {
  using Lanes = decltype(V{} < V{});
  Lanes index;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<V>; ++i) index[i] = i;
  return index >= kWidth<V> - count ? value : V{};
}

// Lane j of the result: of segment j / Half of (a, b), element Offset + j % Half.
template <int Half, int Offset, class V, int... Lane>
WEFT_INLINE V half_segments(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane / Half * 2 * Half + Offset + Lane % Half)...);
}

}  // namespace detail

// Adds up each of N vectors (N a power of two, at most V's lanes): sum i is lane i of the result.
// Every vector holds segments of partial sums of one accumulator each; a level adds their halves.
template <class V, int N, int Segment = detail::kWidth<V>>
WEFT_INLINE V fold(const V (&partial)[N]) {
  if constexpr (Segment == 1) {
    return partial[0];
  } else {
    using Lanes = std::make_integer_sequence<int, detail::kWidth<V>>;
    constexpr int kNext = N > 1 ? N / 2 : 1;
    V next[kNext];
#pragma GCC unroll 16
    for (int i = 0; i < kNext; ++i) {
      const V a = partial[2 * i], b = partial[N > 1 ? 2 * i + 1 : 0];
      next[i] = detail::half_segments<Segment / 2, 0>(a, b, Lanes{}) +
                detail::half_segments<Segment / 2, Segment / 2>(a, b, Lanes{});
    }
    return fold<V, kNext, Segment / 2>(next);
  }
}

// Terms that dot_rows takes from a row at a time.
template <bool kPairs, class T>
inline constexpr int kDotStep = (kPairs ? 2 : 1) * kLanes<T>;

namespace detail {

template <bool kPairs, class T>
WEFT_INLINE auto load_step(const T* row) {
  if constexpr (kPairs) {
    return load_terms(row, kDotStep<true, T>);
  } else {
    return load_vec(row);
  }
}

// The last `left` of a row's k terms, fewer than a step; zeros in the other lanes.
template <bool kPairs, class T>
WEFT_INLINE auto load_last(const T* row, int64_t k, int left) {
  constexpr int kStep = kDotStep<kPairs, T>;
  if constexpr (kPairs) {
    return load_terms(row + k - left, left);
  } else {  // of the last whole vector, without the lanes that are already in the sum
    return k >= kStep ? keep_last(load_vec(row + k - kStep), left) : load_part(row, left);
  }
}

}  // namespace detail

// sum[m][kColumns.at[r]] += the products of row m of `a` and row r of `b` over k; with kPairs by
// pairs_cpu.h's dot products.
template <auto kColumns, bool kPairs, int R, int M, int C, class T, class V>
WEFT_INLINE void dot_rows(V (&sum)[M][C], const T* a, int64_t a_stride, const T* const (&b)[R],
                          int64_t k) {
  constexpr int kStep = kDotStep<kPairs, T>;
  const auto step = [&](auto load) __attribute__((always_inline)) {
    V row[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) row[m] = load(a + m * a_stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V column = load(b[r]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        if constexpr (kPairs) {
          add_pairs(sum[m][kColumns.at[r]], row[m], column);
        } else {
          sum[m][kColumns.at[r]] += row[m] * column;
        }
      }
    }
  };
  int64_t at = 0;
  for (; at + kStep <= k; at += kStep)
    step([&](const T* row)
             __attribute__((always_inline)) { return detail::load_step<kPairs>(row + at); });
  if (const auto left = static_cast<int>(k - at); left > 0)
    step([&](const T* row)
             __attribute__((always_inline)) { return detail::load_last<kPairs>(row, k, left); });
}

// ---- rows that lie across cache lines ----------------------------------------------------------

// A vector across two cache lines is two accesses: where a vector is as long as a line, rows that
// do not begin at one are read at half the speed. (Of shorter vectors few lie across, and copies
// gained nothing.) Whether a copy of `rows` [.., k] is read faster.
template <bool kPairs, class T>
bool lie_across(const T* rows, int64_t k) {
  constexpr uintptr_t kLine = 64;
  if (kDotStep<kPairs, T> * sizeof(T) != kLine) return false;
  return (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(k) * sizeof(T)) % kLine != 0;
}

// Terms of a row's copy.
template <bool kPairs, class T>
int64_t whole_steps(int64_t k) {
  constexpr int64_t kStep = kDotStep<kPairs, T>;
  return (k + kStep - 1) / kStep * kStep;
}

// Copies a row so that dot_rows over its whole steps gives the very same sums.
template <bool kPairs, class T>
void copy_steps(const T* row, int64_t k, T* to) {
  constexpr int64_t kStep = kDotStep<kPairs, T>;
  if constexpr (kStep * sizeof(T) == kVectorBytes) {
    const int64_t whole = k / kStep * kStep;
    const auto store = [](T* at, const auto& vector) {
      memcpy(static_cast<void*>(at), &vector, kVectorBytes);
    };
    for (int64_t i = 0; i < whole; i += kStep) store(to + i, detail::load_step<kPairs>(row + i));
    if (whole < k)
      store(to + whole, detail::load_last<kPairs>(row, k, static_cast<int>(k - whole)));
  }
}

}  // namespace weft::WEFT_TARGET
