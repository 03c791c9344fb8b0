// What pooling on CPU reduces with, and how a line of elements is reduced over shifted windows.
//
// A reduction works on `E`, the element that its lanes hold, and loads and stores T as E. Sums hold
// the accumulation type. Maxima of half types hold 16-bit integers in the order of the values, so a
// vector holds as many of them as of T, and comparing is one instruction.
//
// A window of k neighbours costs log2(k) passes over a line by doubling: a window of 2p is two
// windows of p. A maximum may count elements twice, so the last step overlaps two windows of the
// largest power of two; a sum adds one window for each binary digit of k. Each result is made of
// its own window's elements alone, in an order that only k decides: no running sum whose error
// grows along the row, and the same bits wherever a thread starts.
#pragma once

#include <limits>

#include "core/scratch.h"
#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kBlock = 4;  // vectors of accumulators that a pass keeps in registers

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

template <class T>
struct SumOf {
  using E = accumulate_t<T>;
  using V = Vec<E>;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr bool kIdempotent = false;
  static constexpr bool kPlaces = false;
  static constexpr E kNeutral = 0;

  static WEFT_INLINE V reduce(V sum, V value) { return sum + value; }
  static WEFT_INLINE V load(const T* address) { return load_vec(address); }
  static WEFT_INLINE void store(T* address, V value) { store_vec(address, value); }
};

template <class T>
struct MaxOf {
  using E = T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = kLanes<T>;
  static constexpr bool kIdempotent = true;
  static constexpr bool kPlaces = false;
  static constexpr E kNeutral = -std::numeric_limits<T>::infinity();

  static WEFT_INLINE V reduce(V best, V value) {
    return value == value ? greater_of(value, best) : value;  // NaN stays
  }
  static WEFT_INLINE V load(const T* address) { return load_vec(address); }
  static WEFT_INLINE void store(T* address, V value) { store_vec(address, value); }
};

// Negative numbers order by magnitude the other way round, so their magnitude bits are flipped; any
// NaN becomes the largest integer, which is a NaN again.
template <class T, uint16_t kInfinity>
struct MaxOfHalf {
  using E = int16_t;
  using V = Vec<int16_t>;
  static constexpr int64_t kWidth = kVectorBytes / 2;
  static constexpr bool kIdempotent = true;
  static constexpr bool kPlaces = false;
  static constexpr E kNeutral = static_cast<E>(~kInfinity);  // -inf

  static WEFT_INLINE V flip(V value) { return value ^ ((value >> 15) & 0x7FFF); }
  static WEFT_INLINE V reduce(V best, V value) { return value > best ? value : best; }
  static WEFT_INLINE V load(const T* address) {
    V bits;
    memcpy(&bits, address, sizeof(bits));
    const V key = flip(bits);
    return key < kNeutral ? V{} + int16_t{0x7FFF} : key;
  }
  static WEFT_INLINE void store(T* address, V value) {
    const V bits = flip(value);
    memcpy(static_cast<void*>(address), &bits, sizeof(bits));
  }
};
template <>
struct MaxOf<bf16> : MaxOfHalf<bf16, 0x7F80> {};
template <>
struct MaxOf<f16> : MaxOfHalf<f16, 0x7C00> {};

template <class E>
WEFT_INLINE Vec<E> load_lanes(const E* address) {
  return detail::load_bits<E, kVectorBytes / static_cast<int>(sizeof(E))>(address);
}
template <class E>
WEFT_INLINE void store_lanes(E* address, Vec<E> value) {
  memcpy(static_cast<void*>(address), &value, sizeof(value));
}

// The first `count` elements alone; the other lanes read as zero. A call of memcpy for a few bytes
// would cost more than a short row.
template <class Op, class T>
WEFT_INLINE typename Op::V load_some(const T* address, int64_t count) {
  alignas(64) T buffer[64 / sizeof(T)] = {};
#if defined(__AVX512BW__)
  const __mmask64 bytes = (uint64_t{1} << (count * sizeof(T))) - 1;
  _mm512_store_si512(buffer, _mm512_maskz_loadu_epi8(bytes, address));
#else
  memcpy(static_cast<void*>(buffer), address, count * sizeof(T));
#endif
  return Op::load(buffer);
}
template <class Op, class T>
WEFT_INLINE void store_some(T* address, typename Op::V value, int64_t count) {
  alignas(64) T buffer[64 / sizeof(T)];
  Op::store(buffer, value);
#if defined(__AVX512BW__)
  const __mmask64 bytes = (uint64_t{1} << (count * sizeof(T))) - 1;
  _mm512_mask_storeu_epi8(address, bytes, _mm512_load_si512(buffer));
#else
  memcpy(static_cast<void*>(address), buffer, count * sizeof(T));
#endif
}
// Vector j of a row of n elements.
template <class Op, class T>
WEFT_INLINE void store_row(T* row, int64_t j, int64_t n, typename Op::V value) {
  if (j + Op::kWidth <= n) return Op::store(row + j, value);
  store_some<Op>(row + j, value, n - j);
}

// Places of a vector of outputs, as integers of its lanes. The compiler converts bytes one by one.
template <class Place, class I>
WEFT_INLINE Vec<I> load_places(const Place* places) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(I));
#if defined(__AVX512BW__)
  if constexpr (sizeof(Place) == 1 && sizeof(I) == 4)
    return (Vec<I>)_mm512_maskz_cvtepu8_epi32(
        0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
  else if constexpr (sizeof(Place) == 1)
    return (Vec<I>)_mm512_maskz_cvtepu8_epi64(
        0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
  else
#elif defined(__AVX2__)
  if constexpr (sizeof(Place) == 1 && sizeof(I) == 4)
    return (Vec<I>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
  else
#endif
    return __builtin_convertvector((detail::load_bits<Place, kCount>(places)), Vec<I>);
}
template <class Place, class I>
WEFT_INLINE void store_places(Place* row, int64_t j, int64_t n, Vec<I> code) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(I));
  const int64_t left = n - j;
#if defined(__AVX512BW__)
  if constexpr (sizeof(Place) == 1) {
    __m128i bytes;
    if constexpr (sizeof(I) == 4)
      bytes = _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)code);
    else
      bytes = _mm512_maskz_cvtepi64_epi8(0xFF, (__m512i)code);
    const int64_t lanes = left < kCount ? left : kCount;
    return _mm_mask_storeu_epi8(row + j, static_cast<__mmask16>((1u << lanes) - 1), bytes);
  }
#endif
  using Narrow = typename vector_of<Place, kCount>::type;
  const Narrow places = __builtin_convertvector(code, Narrow);
  memcpy(row + j, &places, (left < kCount ? left : kCount) * sizeof(Place));
}

// The larger of two candidates and its code; the first of equal ones, the last NaN.
template <class V, class C>
WEFT_INLINE void take_larger(V& best, C& code, V value, C value_code) {
  const auto replace = (value > best) | (value != value);
  best = replace ? value : best;
  code = replace ? value_code : code;
}

// The integers that have as many lanes as E.
template <class E>
using lane_index = std::conditional_t<sizeof(E) == 8, int64_t,
                                      std::conditional_t<sizeof(E) == 4, int32_t, int16_t>>;

// True in the first `count` lanes.
template <class E>
WEFT_INLINE auto lanes_before(int64_t count) {
  using I = lane_index<E>;
  Vec<I> lane;
  for (int l = 0; l < static_cast<int>(sizeof(lane) / sizeof(I)); ++l) lane[l] = static_cast<I>(l);
  return lane < broadcast<Vec<I>>(static_cast<I>(count));
}

// The lanes of `value` from `count` on become neutral.
template <class Op>
WEFT_INLINE typename Op::V neutral_after(typename Op::V value, int64_t count) {
  return lanes_before<typename Op::E>(count) ? value : broadcast<typename Op::V>(Op::kNeutral);
}

// Lane l of the result is the reduction of all lanes of values[l]; `values` are lost.
template <class Op, int kCount = Op::kWidth>
WEFT_INLINE typename Op::V reduce_lanes(typename Op::V* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      typename Op::V even, odd;
      deinterleave(values[2 * i], values[2 * i + 1], even, odd);
      values[i] = Op::reduce(even, odd);
    }
    return reduce_lanes<Op, kCount / 2>(values);
  }
}

template <class E>
WEFT_INLINE void fill_lanes(E* out, int64_t count, E value) {
  constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(E));
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) store_lanes(out + j, broadcast<Vec<E>>(value));
  for (; j < count; ++j) out[j] = value;
}

// The rows of a window are read side by side, which no hardware prefetcher takes for the one run of
// memory that they are together; without this, rows of 112 floats come at a quarter of its speed.
constexpr int64_t kAheadBytes = 4096;
template <class T>
WEFT_INLINE void prefetch_ahead(const T* address, int64_t bytes = kAheadBytes) {
  // As an integer: it may lie beyond the array.
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + bytes));
}

// Vectors j, j + kWidth ... of out[j] = reduce_k sources[k][j]; the last one ends at n at most, so
// it may overlap the one before.
template <class Op, int kVectors, class T>
WEFT_INLINE void reduce_vectors(const T* const* sources, int64_t count, int64_t j, int64_t n,
                                typename Op::E* out, int64_t ahead) {
  constexpr int64_t kWidth = Op::kWidth;
  int64_t at[kVectors];
  typename Op::V sum[kVectors];
  for (int b = 0; b < kVectors; ++b) {
    const int64_t begin = j + b * kWidth;
    at[b] = b + 1 < kVectors || begin + kWidth <= n ? begin : n - kWidth;
    prefetch_ahead(sources[0] + at[b], ahead);
    sum[b] = Op::load(sources[0] + at[b]);
  }
  for (int64_t k = 1; k < count; ++k)
    for (int b = 0; b < kVectors; ++b) {
      prefetch_ahead(sources[k] + at[b], ahead);
      sum[b] = Op::reduce(sum[b], Op::load(sources[k] + at[b]));
    }
  for (int b = 0; b < kVectors; ++b) store_lanes(out + at[b], sum[b]);
}

// out[j] = reduce_k sources[k][j] for j in [0, n), count > 0; writes nothing beyond n. What lies
// `ahead` bytes further is asked for.
template <class Op, class T>
void reduce_rows(const T* const* sources, int64_t count, int64_t n, typename Op::E* out,
                 int64_t ahead = kAheadBytes) {
  constexpr int64_t kWidth = Op::kWidth;
  if (n < kWidth) {
    typename Op::V sum = load_some<Op>(sources[0], n);
    for (int64_t k = 1; k < count; ++k) sum = Op::reduce(sum, load_some<Op>(sources[k], n));
    memcpy(static_cast<void*>(out), &sum, n * sizeof(typename Op::E));
    return;
  }
  int64_t j = 0;
  for (; n - j > (kBlock - 1) * kWidth; j += kBlock * kWidth)
    reduce_vectors<Op, kBlock>(sources, count, j, n, out, ahead);
  if (n - j > 2 * kWidth) return reduce_vectors<Op, 3>(sources, count, j, n, out, ahead);
  if (n - j > kWidth) return reduce_vectors<Op, 2>(sources, count, j, n, out, ahead);
  if (n > j) reduce_vectors<Op, 1>(sources, count, j, n, out, ahead);
}

// line[j] = reduce(line[j], other[j]) for whole vectors of [0, n); `other` may lie above `line`.
template <class Op>
WEFT_INLINE void reduce_into(typename Op::E* line, const typename Op::E* other, int64_t n) {
  for (int64_t j = 0; j < n; j += Op::kWidth)
    store_lanes(line + j, Op::reduce(load_lanes(line + j), load_lanes(other + j)));
}

// The reduction over windows of `size` elements, `step` apart, that start at each of the first n
// elements of `line`; returns where it lies: `line`, or `spare`, which only sums need. Both are
// overwritten, and are read for (size - 1) * step elements and a vector past n.
template <class Op>
typename Op::E* reduce_windows(typename Op::E* line, typename Op::E* spare, int64_t n, int64_t size,
                               int64_t step) {
  const int64_t reach = n + (size - 1) * step;
  int64_t done = 0;  // elements of the windows that `spare` holds: binary digits of `size` so far
  for (int64_t power = 1;; power *= 2) {
    const bool last = 2 * power > size;
    if (!Op::kIdempotent && (size & power) != 0) {
      const int64_t valid = reach - (done + power - 1) * step;
      if (done == 0) {
        if (last) return line;
        memcpy(static_cast<void*>(spare), line, valid * sizeof(*line));
      } else {
        for (int64_t j = 0; j < valid; j += Op::kWidth)
          store_lanes(spare + j,
                      Op::reduce(load_lanes(line + j), load_lanes(spare + j + power * step)));
      }
      done += power;
    }
    if (last) {
      if (!Op::kIdempotent) return spare;
      if (power < size) reduce_into<Op>(line, line + (size - power) * step, n);
      return line;
    }
    reduce_into<Op>(line, line + power * step, reach - (2 * power - 1) * step);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
