// Squares of a matrix, turned round in registers.
#pragma once

#include <utility>

#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

// Lane j of the result: of the segments of `Size` lanes, first those of `a` and `b` at even places
// (Odd = 0) or those at odd places, in turn.
template <int Size, int Odd, class V, int... Lane>
WEFT_INLINE V blend_segments(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int kLane = sizeof...(Lane);
  return __builtin_shufflevector(
      a, b, ((Lane & Size ? kLane : 0) + (Lane & ~Size) + (Odd ? Size : 0))...);
}

// Lane j of rows[i] and lane i of rows[j] change places.
template <int Size = 1, class V, int L>
WEFT_INLINE void transpose(V (&rows)[L]) {
  if constexpr (Size < L) {
    using Lanes = std::make_integer_sequence<int, L>;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & Size) continue;
      const V a = rows[i], b = rows[i + Size];
      rows[i] = blend_segments<Size, 0>(a, b, Lanes{});
      rows[i + Size] = blend_segments<Size, 1>(a, b, Lanes{});
    }
    transpose<Size * 2>(rows);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
