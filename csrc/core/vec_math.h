// exp, sigmoid and tanh on whole vectors, for CPU kernels.
//
// exp(x) = 2^n * e^r with n = round(x / ln 2) and |r| <= ln(2)/2; e^r is a polynomial. Largest
// error measured over [-88, 88], in float and in double: sigmoid 1.9 ulp (above zero, where all of
// its large values are, 0.9), tanh 1.3 ulp. exp flushes results below the smallest normal number to
// about that number. NaN stays NaN; +-inf give the limits.
#pragma once

#include "core/simd.h"

namespace weft::WEFT_TARGET {

namespace detail {

template <class V>
struct MathConstants;

template <>
struct MathConstants<Vec<float>> {
  using Bits = Vec<uint32_t>;
  static constexpr float kLargest = 88.72283f;  // exp of more overflows
  static constexpr float kInfinite = 89.0f;     // exp of it is infinite
  static constexpr float kSmallest = -86.5f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kBias = 127;
  // (e^r - 1 - r) / r^2, highest power first (Cephes expf).
  static constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct MathConstants<Vec<double>> {
  using Bits = Vec<uint64_t>;
  static constexpr double kLargest = 709.782712893384;
  static constexpr double kInfinite = 710.0;
  static constexpr double kSmallest = -707.0;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kBias = 1023;
  // Taylor: 1/13!, ..., 1/2!.
  static constexpr double kExp[] = {
      1.6059043836821613e-10, 2.08767569878681e-09,   2.505210838544172e-08,  2.755731922398589e-07,
      2.7557319223985893e-06, 2.48015873015873e-05,   1.984126984126984e-04,  1.388888888888889e-03,
      8.333333333333333e-03,  4.1666666666666664e-02, 1.6666666666666666e-01, 0.5};
};

template <class V, class T, int N>
WEFT_INLINE V polynomial(V x, const T (&coefficient)[N]) {
  V sum = V{} + coefficient[0];
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) sum = sum * x + coefficient[i];
  return sum;
}

#if defined(__AVX512F__)
// x * 2^n.
WEFT_INLINE Vec<float> times_power(Vec<float> x, Vec<float> n) {
  return _mm512_maskz_scalef_ps(0xFFFF, x, n);
}
WEFT_INLINE Vec<double> times_power(Vec<double> x, Vec<double> n) {
  return _mm512_maskz_scalef_pd(0xFF, x, n);
}
#endif

// tanh for |x| < 0.625, as a correction to x (Cephes).
WEFT_INLINE Vec<float> small_tanh(Vec<float> x) {
  constexpr float kTanh[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                             1.33314422036e-1f, -3.33332819422e-1f};
  const Vec<float> z = x * x;
  return x + x * (z * polynomial(z, kTanh));
}
WEFT_INLINE Vec<double> small_tanh(Vec<double> x) {
  constexpr double kTop[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1,
                             -1.61468768441708447952e3};
  constexpr double kBottom[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3,
                                4.84406305325125486048e3};
  const Vec<double> z = x * x;
  return x + x * (z * polynomial(z, kTop) / polynomial(z, kBottom));
}

}  // namespace detail

template <class V>
WEFT_INLINE V vec_exp(V x) {
  using C = detail::MathConstants<V>;
  V bounded = greater_of(V{} + C::kSmallest, x);
#if defined(__AVX512F__)
  bounded = lesser_of(V{} + C::kInfinite, bounded);
#endif
  const V shifted = bounded * decltype(C::kMagic){1.4426950408889634} + C::kMagic;
  const V n = shifted - C::kMagic;
  V r = bounded - n * C::kLn2High;
  r = r - n * C::kLn2Low;
  const V power = detail::polynomial(r, C::kExp) * (r * r) + r + decltype(C::kMagic){1};
#if defined(__AVX512F__)
  return detail::times_power(power, n);
#else
  // 2^(n-1) and then twice: n itself may be one more than the exponent field holds.
  typename C::Bits bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (C::kBias - 1)) << C::kMantissaBits;
  V scale;
  memcpy(&scale, &bits, sizeof(scale));
  const V result = power * scale * decltype(C::kMagic){2};
  return x > C::kLargest ? V{} + static_cast<decltype(C::kMagic)>(__builtin_inf()) : result;
#endif
}

template <class V>
WEFT_INLINE V vec_sigmoid(V x) {
  using T = decltype(detail::MathConstants<V>::kMagic);
  const V e = vec_exp(-x), y = T{1} / (T{1} + e);
  // 1 + e has lost up to half of y's last place: one step of Newton's on what y (1 + e) lacks of 1.
  // Where e is infinite, y is zero and stays so.
  const V lack = greater_of((T{1} - y) - y * e, V{} - T{1});
  return y + y * lack;
}

template <class V>
WEFT_INLINE V vec_tanh(V x) {
  using T = decltype(detail::MathConstants<V>::kMagic);
  using Bits = typename detail::MathConstants<V>::Bits;
  Bits bits, sign;
  const V negative_zero = -V{};
  memcpy(&sign, &negative_zero, sizeof(sign));
  memcpy(&bits, &x, sizeof(bits));
  sign &= bits;
  bits ^= sign;
  V magnitude;
  memcpy(&magnitude, &bits, sizeof(bits));
  const V large = T{1} - T{2} / (vec_exp(magnitude + magnitude) + T{1});
  const V small = detail::small_tanh(magnitude);
  V result = magnitude < T{0.625} ? small : large;
  memcpy(&bits, &result, sizeof(bits));
  bits |= sign;
  memcpy(&result, &bits, sizeof(bits));
  return result;
}

}  // namespace weft::WEFT_TARGET
