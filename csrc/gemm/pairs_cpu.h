// bf16 products by the processor's dot products of pairs (AVX512-BF16): twice the terms a step.
//
// The layout is packed_cpu.h's with one word of 32 bits, two neighbouring terms, in the place of
// each widened number: a panel's row i holds terms 2i and 2i + 1 of its columns, a row of A its
// terms as they lie; an odd last term has a zero beside it. Sums are float32. The instructions are
// asked for at run time (`has_pairs`) and written as assembly, so that the file is compiled for
// AVX-512 as a whole.
#pragma once

#include <utility>

#include "core/simd.h"
#include "gemm/pack_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)

inline bool has_pairs() {
  static const bool found = __builtin_cpu_supports("avx512bf16") > 0;
  return found;
}

using Words = Vec<uint32_t>;

WEFT_INLINE Vec<float> as_floats(Words words) {
  Vec<float> result;
  memcpy(&result, &words, sizeof(result));
  return result;
}

// The word at `address` in every lane; arithmetic on it as a number would change the bits of a NaN.
WEFT_INLINE Vec<float> broadcast_word(const float* address) {
  uint32_t bits;
  memcpy(&bits, address, sizeof(bits));
  return as_floats(Words{} + bits);
}

// sum[j] += the products of both terms of word j of a and b.
WEFT_INLINE void add_pairs(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// store_vec by the processor's own rounding, which takes numbers below the least normal one as
// zero, as its products do.
WEFT_INLINE void store_rounded(bf16* address, Vec<float> value) {
  __m256i halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(value));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), halves);
}

// One vector of elements, `count` of them, as the low halves of words.
WEFT_INLINE Words load_halves(const bf16* address, int64_t count) {
  constexpr int kLane = kLanes<bf16>;
  const unsigned mask = count >= kLane ? 0xFFFFu : count > 0 ? (1u << count) - 1 : 0u;
  return (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(mask, address));
}

// Words of elements of `low` and `high`, `count` of each; zeros where `high` is null.
WEFT_INLINE Vec<float> load_pairs(const bf16* low, const bf16* high, int64_t count) {
  const Words words = load_halves(low, count);
  return as_floats(high == nullptr ? words : words | load_halves(high, count) << 16);
}

// Two vectors of words of elements of `low` and `high`, which are neighbours each.
template <int kFirst, int... Half>
WEFT_INLINE Vec<float> interleaved_halves(const bf16* low, const bf16* high,
                                          std::integer_sequence<int, Half...>) {
  constexpr int kHalves = sizeof...(Half);
  using Halves = vector_of<uint16_t, kHalves>::type;
  Halves a, b;
  memcpy(&a, low, sizeof(a));
  memcpy(&b, high, sizeof(b));
  const Halves words = __builtin_shufflevector(a, b, (kFirst + Half / 2 + Half % 2 * kHalves)...);
  Vec<float> result;
  memcpy(&result, &words, sizeof(result));
  return result;
}
WEFT_INLINE void interleave_halves(const bf16* low, const bf16* high, float* out) {
  constexpr int kLane = kLanes<bf16>;
  using All = std::make_integer_sequence<int, 2 * kLane>;
  store_vec(out, interleaved_halves<0>(low, high, All{}));
  store_vec(out + kLane, interleaved_halves<kLane>(low, high, All{}));
}

// Lane j: terms `term` and `term + 1` of column j, whose terms are `stride` apart; columns are
// neighbours.
WEFT_INLINE Vec<float> pair_rows(const bf16* source, int64_t stride, int64_t term, int64_t terms,
                                 int64_t columns) {
  const Words low = term < terms ? load_halves(source + term * stride, columns) : Words{};
  const Words high =
      term + 1 < terms ? load_halves(source + (term + 1) * stride, columns) : Words{};
  return as_floats(low | high << 16);
}

// `count` neighbouring terms, at most two vectors' worth, as words.
WEFT_INLINE Vec<float> load_terms(const bf16* address, int64_t count) {
  constexpr int64_t kTerms = 2 * kLanes<bf16>;
  Vec<float> words = {};
  if (count >= kTerms) {
    memcpy(&words, address, sizeof(words));
  } else if (count > 0) {
    bf16 held[kTerms] = {};
    memcpy(static_cast<void*>(held), address, count * sizeof(bf16));
    memcpy(&words, held, sizeof(words));
  }
  return words;
}

// pack_vector of pack_cpu.h, in words.
inline void pack_pairs(const bf16* source, int64_t k_stride, int64_t stride, int64_t count,
                       int64_t k, int vectors, float* panel) {
  constexpr int kLane = kLanes<bf16>;
  const int64_t step = vectors * kLane, words = (k + 1) / 2;
  if (k_stride == 1) {
    for (int64_t first = 0; first < words; first += kLane) {
      Vec<float> rows[kLane];
#pragma GCC unroll 16
      for (int j = 0; j < kLane; ++j)
        rows[j] =
            j < count ? load_terms(source + j * stride + 2 * first, k - 2 * first) : Vec<float>{};
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLane; ++i)
        if (first + i < words) store_vec(panel + (first + i) * step, rows[i]);
    }
    return;
  }
  for (int64_t i = 0; i < words; ++i) {
    if (stride == 1) {
      store_vec(panel + i * step, pair_rows(source, k_stride, 2 * i, k, count));
      continue;
    }
    Words pairs = {};
    for (int64_t j = 0; j < kLane && j < count; ++j)
      for (int64_t half = 0; half < 2 && 2 * i + half < k; ++half)
        pairs[j] |= static_cast<uint32_t>(source[(2 * i + half) * k_stride + j * stride].bits)
                    << 16 * half;
    store_vec(panel + i * step, as_floats(pairs));
  }
}

// Rows of A, `step` words apart.
inline void copy_pairs(const bf16* source, int64_t row_stride, int64_t k_stride, int64_t rows,
                       int64_t k, float* out, int64_t step) {
  constexpr int kLane = kLanes<bf16>;
  if (row_stride == 1) {
    for (int64_t word = 0; 2 * word < k; word += kLane)
      for (int64_t first = 0; first < rows; first += kLane) {
        Vec<float> block[kLane];
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i)
          block[i] = pair_rows(source + first, k_stride, 2 * (word + i), k, rows - first);
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLane; ++r)
          if (first + r < rows) store_vec(out + (first + r) * step + word, block[r]);
      }
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t word = 0; 2 * word < k; word += kLane) {
      const bf16* at = source + r * row_stride + 2 * word * k_stride;
      if (k_stride == 1) {
        store_vec(out + r * step + word, load_terms(at, k - 2 * word));
      } else {
        for (int64_t i = 0; i < kLane && 2 * (word + i) < k; ++i) {
          uint32_t pair = at[2 * i * k_stride].bits;
          if (2 * (word + i) + 1 < k)
            pair |= static_cast<uint32_t>(at[(2 * i + 1) * k_stride].bits) << 16;
          out[r * step + word + i] = weft::detail::bit_cast<float>(pair);
        }
      }
    }
}

#else

constexpr bool has_pairs() { return false; }

#endif

}  // namespace
}  // namespace weft::WEFT_TARGET
