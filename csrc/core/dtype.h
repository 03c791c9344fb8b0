// Element types of kernels, and the one dtype dispatch.
//
// Kernels are torch-free, so the half types are plain 16-bit storage here; both are bit-compatible
// with at::BFloat16 / at::Half. Arithmetic on them is done in `accumulate_t` (float).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define WEFT_HD __host__ __device__ __forceinline__
#else
#define WEFT_HD inline __attribute__((always_inline))
#endif

namespace weft {

enum class DType : uint8_t { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// The type in which values of T are added up: half types accumulate in float.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

namespace detail {

template <class To, class From>
WEFT_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

WEFT_HD float bf16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest even; NaN stays NaN.
WEFT_HD uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

WEFT_HD float f16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7FFFu;
  if (magnitude >= 0x7C00u)  // inf and NaN
    return bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  // Subnormal halves are normal floats, so the product with 2^112 rebiases both kinds exactly.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | sign);
#endif
}

// Round to nearest even; overflow goes to inf.
WEFT_HD uint16_t float_to_f16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // below the smallest normal half: let the adder round
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3F000000u));
  }
  magnitude += 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
#endif
}

}  // namespace detail

WEFT_HD float widen(float value) { return value; }
WEFT_HD double widen(double value) { return value; }
WEFT_HD float widen(bf16 value) { return detail::bf16_to_float(value.bits); }
WEFT_HD float widen(f16 value) { return detail::f16_to_float(value.bits); }

template <class T>
WEFT_HD T narrow(accumulate_t<T> value) {
  return static_cast<T>(value);
}
template <>
WEFT_HD bf16 narrow<bf16>(float value) {
  return bf16{detail::float_to_bf16(value)};
}
template <>
WEFT_HD f16 narrow<f16>(float value) {
  return f16{detail::float_to_f16(value)};
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls `body(TypeTag<T>{})` with the element type of `dtype`.
template <class Body>
inline __attribute__((always_inline)) void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(TypeTag<float>{});
    case DType::f64:
      return body(TypeTag<double>{});
    case DType::bf16:
      return body(TypeTag<bf16>{});
    case DType::f16:
      return body(TypeTag<f16>{});
  }
}

}  // namespace weft
