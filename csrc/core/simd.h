// SIMD for CPU kernels: the compiler's own vector types, one width per target.
//
// GCC's and Clang's vector extensions give arithmetic, comparisons and `mask ? a : b` on Vec<T>
// directly, without torch and without an intrinsic per ISA; only what they lack stands here: loads
// and stores that convert half types, tails, broadcasts. Included by *_cpu.cpp alone; everything is
// in the target's namespace, so code for one ISA is never linked into another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace weft::WEFT_TARGET {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#define WEFT_INLINE inline __attribute__((always_inline))

// Bytes wide enough for `Count` elements of T; a full vector unless said otherwise.
template <class T, int Count = kVectorBytes / static_cast<int>(sizeof(T))>
struct vector_of {
  typedef T type __attribute__((vector_size(Count * sizeof(T))));
};
template <class T>
using Vec = typename vector_of<T>::type;

// How many values of the accumulation type of T one vector holds.
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(accumulate_t<T>));

template <class V, class T>
WEFT_INLINE V broadcast(T value) {
  return V{} + value;  // exact for every value but -0, which becomes +0
}

namespace detail {

template <class T, int Count>
WEFT_INLINE auto load_bits(const T* address) {
  typename vector_of<T, Count>::type bits;
  memcpy(&bits, address, sizeof(bits));
  return bits;
}

}  // namespace detail

// kLanes<T> elements, widened to the accumulation type.
WEFT_INLINE Vec<float> load_vec(const float* address) {
  return detail::load_bits<float, kLanes<float>>(address);
}
WEFT_INLINE Vec<double> load_vec(const double* address) {
  return detail::load_bits<double, kLanes<double>>(address);
}
WEFT_INLINE Vec<float> load_vec(const bf16* address) {
#if defined(__AVX512F__)
  // One instruction that the compiler makes four of; masked, see below.
  const auto wide = (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(
                        0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address)))
                    << 16;
#else
  const auto bits =
      detail::load_bits<uint16_t, kLanes<bf16>>(reinterpret_cast<const uint16_t*>(address));
  const auto wide = __builtin_convertvector(bits, Vec<uint32_t>) << 16;
#endif
  Vec<float> result;
  memcpy(&result, &wide, sizeof(result));
  return result;
}
WEFT_INLINE Vec<float> load_vec(const f16* address) {
#if defined(__AVX512F__)
  // The unmasked intrinsic makes GCC 12 warn of an uninitialised operand.
  return _mm512_maskz_cvtph_ps(0xFFFF,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(address)));
#else
  Vec<float> result;
  for (int i = 0; i < kLanes<f16>; ++i) result[i] = widen(address[i]);
  return result;
#endif
}

WEFT_INLINE void store_vec(float* address, Vec<float> value) {
  memcpy(address, &value, sizeof(value));
}
WEFT_INLINE void store_vec(double* address, Vec<double> value) {
  memcpy(address, &value, sizeof(value));
}

namespace detail {

// Rounded to nearest even; NaN stays NaN.
WEFT_INLINE Vec<uint32_t> bf16_bits(Vec<float> value) {
  Vec<uint32_t> bits;
  memcpy(&bits, &value, sizeof(bits));
  const Vec<uint32_t> rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (value == value) ? rounded : (Vec<uint32_t>{} + 0x7FC0u);
}

WEFT_INLINE void store_halves(bf16* address, Vec<uint32_t> bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(address),
                      _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)bits));
#else
  using Half = vector_of<uint16_t, kLanes<bf16>>::type;
  const Half half = __builtin_convertvector(bits, Half);
  memcpy(static_cast<void*>(address), &half, sizeof(half));
#endif
}

}  // namespace detail

WEFT_INLINE void store_vec(bf16* address, Vec<float> value) {
  detail::store_halves(address, detail::bf16_bits(value));
}
// Of numbers that bf16 holds.
WEFT_INLINE void store_exact(bf16* address, Vec<float> value) {
  Vec<uint32_t> bits;
  memcpy(&bits, &value, sizeof(bits));
  detail::store_halves(address, bits >> 16);
}
WEFT_INLINE void store_vec(f16* address, Vec<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(address),
      _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(address),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<f16>; ++i) address[i] = narrow<f16>(value[i]);
#endif
}

// `value` as memory of a half type holds it.
template <class T>
WEFT_INLINE Vec<float> round_to(Vec<float> value) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Vec<uint32_t> rounded = detail::bf16_bits(value) << 16;
    memcpy(&value, &rounded, sizeof(value));
    return value;
  } else {
    T held[kLanes<T>];
    store_vec(held, value);
    return load_vec(held);
  }
}

// The first `count` elements only; the other lanes read as zero and are not written.
template <class T>
WEFT_INLINE auto load_part(const T* address, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return Vec<float>(_mm512_maskz_loadu_ps((1u << count) - 1, address));
  } else if constexpr (std::is_same_v<T, double>) {
    return Vec<double>(_mm512_maskz_loadu_pd((1u << count) - 1, address));
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16((1u << count) - 1, address);
    if constexpr (std::is_same_v<T, f16>)
      return Vec<float>(_mm512_maskz_cvtph_ps(0xFFFF, halves));
    else
      return Vec<float>((__m512)((Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, halves) << 16));
  }
#else
  {
    T buffer[kLanes<T>] = {};
    memcpy(static_cast<void*>(buffer), address, count * sizeof(T));
    return load_vec(buffer);
  }
#endif
}
template <class T, class V>
WEFT_INLINE void store_part(T* address, V value, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(address, (1u << count) - 1, value);
  else if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(address, (1u << count) - 1, value);
#endif
  T buffer[kLanes<T>];
  store_vec(buffer, value);
  memcpy(static_cast<void*>(address), buffer, count * sizeof(T));
}

// a > b ? a : b, which is b where either is NaN: one instruction that the compiler does not find.
template <class V>
WEFT_INLINE V greater_of(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm512_maskz_max_ps(0xFFFF, a, b);  // see load_vec
  else if constexpr (std::is_same_v<V, Vec<double>>)
    return _mm512_maskz_max_pd(0xFF, a, b);
  else
#elif defined(__AVX__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm256_max_ps(a, b);
  else if constexpr (std::is_same_v<V, Vec<double>>)
    return _mm256_max_pd(a, b);
  else
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm_max_ps(a, b);
  else if constexpr (std::is_same_v<V, Vec<double>>)
    return _mm_max_pd(a, b);
  else
#endif
    return a > b ? a : b;
}

#if defined(__AVX512F__)
// a < b ? a : b, which is b where either is NaN.
WEFT_INLINE Vec<float> lesser_of(Vec<float> a, Vec<float> b) {
  return _mm512_maskz_min_ps(0xFFFF, a, b);
}
WEFT_INLINE Vec<double> lesser_of(Vec<double> a, Vec<double> b) {
  return _mm512_maskz_min_pd(0xFF, a, b);
}
#endif

// The true lanes of a comparison of floats, as bits.
template <class M>
WEFT_INLINE uint64_t lanes_that_hold(M mask) {
  constexpr int kBytes = sizeof(mask[0]);
#if defined(__AVX512DQ__)
  if constexpr (kBytes == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (kBytes == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX__)
  if constexpr (kBytes == 4) return _mm256_movemask_ps((__m256)mask);
  if constexpr (kBytes == 8) return _mm256_movemask_pd((__m256d)mask);
#elif defined(__SSE2__)
  if constexpr (kBytes == 4) return _mm_movemask_ps((__m128)mask);
  if constexpr (kBytes == 8) return _mm_movemask_pd((__m128d)mask);
#endif
  uint64_t bits = 0;
  for (int l = 0; l < kVectorBytes / kBytes; ++l) bits |= uint64_t{mask[l] != 0} << l;
  return bits;
}

// ---- order of lanes
// ------------------------------------------------------------------------------

namespace detail {

template <class V, int... I>
WEFT_INLINE V evens(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, int... I>
WEFT_INLINE V odds(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <int kFirst, class V, int... I>
WEFT_INLINE V interleaved(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kCount = sizeof...(I);
  return __builtin_shufflevector(a, b, ((kFirst + I) / 2 + (kFirst + I) % 2 * kCount)...);
}

template <class V>
using lane_indices = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;

}  // namespace detail

// Even elements of the pair (a, b).
template <class V>
WEFT_INLINE V evens(V a, V b) {
  return detail::evens(a, b, detail::lane_indices<V>{});
}
template <class V>
WEFT_INLINE void deinterleave(V a, V b, V& even, V& odd) {
  even = detail::evens(a, b, detail::lane_indices<V>{});
  odd = detail::odds(a, b, detail::lane_indices<V>{});
}
// The inverse: low and high halves of a0 b0 a1 b1 ...
template <class V>
WEFT_INLINE void interleave(V a, V b, V& low, V& high) {
  low = detail::interleaved<0>(a, b, detail::lane_indices<V>{});
  high = detail::interleaved<sizeof(V) / sizeof(a[0])>(a, b, detail::lane_indices<V>{});
}

// ---- past the cache
// ------------------------------------------------------------------------------

// Copies kBytes, at most a vector, to an address aligned to them, without reading what is there and
// without keeping it in the cache. `stream_fence` must follow before others read it.
template <int kBytes>
WEFT_INLINE void stream_block(void* to, const void* from) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#endif
#if defined(__AVX2__)
  if constexpr (kBytes == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(to),
                               _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16)
    return _mm_stream_si128(static_cast<__m128i*>(to),
                            _mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
  memcpy(to, from, kBytes);
}
// Likewise for `bytes`, a multiple of a vector, to an address aligned to one.
WEFT_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVectorBytes)
    stream_block<kVectorBytes>(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
}
WEFT_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace weft::WEFT_TARGET
