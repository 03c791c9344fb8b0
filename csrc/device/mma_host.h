// ldmatrix and mma executed on the CPU: lanes exchange their parts, each computes its own results.
//
// A lane's row is read when the lane arrives, so a store that another lane of the warp makes after
// that, with no barrier between, is seen or not depending on the order of threads, and reported.
// Sums run over k in ascending order in the accumulator's type; hardware rounds at other places,
// so tests of exact bits use sums that are exact. See device/mma.h.
#pragma once

#include <type_traits>

#include "device/mma.h"

namespace weft::device {
namespace host {

// What lane i deposited in the exchange that was just made.
template <class Value>
const Value& deposited(const void* first, int lane) {
  return *reinterpret_cast<const Value*>(static_cast<const unsigned char*>(first) +
                                         lane * kSlotBytes);
}

template <bool kTransposed>
Pack<uint32_t, 4> ldmatrix(const void* row, const Site& site) {
  check_alignment(row, 16, "ldmatrix");
  check_shared(row, 16, "reads", "from");
  using Row = Pack<uint16_t, 8>;
  exchange(row, sizeof(Row), site);
  const void* rows = slot(0);
  const int g = lane() / 4, t = lane() % 4;
  Pack<uint32_t, 4> words;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int column) -> uint32_t {
      return deposited<Row>(rows, 8 * i + r)[column];
    };
    words[i] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                           : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
  return words;
}

// Element (row, k) of A, and element (k, column) of B, from the lanes that hold them.
template <class T>
struct Parts {
  using A = typename Mma<T>::A;
  using B = typename Mma<T>::B;
  A a;
  B b;

  static accumulate_t<T> half(uint32_t word, int k) {
    return widen(T{static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16)});
  }
  static float masked(uint32_t word) { return weft::detail::bit_cast<float>(word & 0xFFFFE000u); }

  static auto a_at(const void* parts, int row, int k) {
    const auto of = [&](int t) -> const A& { return deposited<Parts>(parts, row % 8 * 4 + t).a; };
    if constexpr (std::is_same_v<T, double>)
      return of(k)[0];
    else if constexpr (std::is_same_v<T, tf32>)
      return masked(of(k % 4)[row / 8 + k / 4 * 2]);
    else
      return half(of(k % 8 / 2)[row / 8 + k / 8 * 2], k);
  }
  static auto b_at(const void* parts, int k, int column) {
    const auto of = [&](int t) -> const B& { return deposited<Parts>(parts, column * 4 + t).b; };
    if constexpr (std::is_same_v<T, double>)
      return of(k)[0];
    else if constexpr (std::is_same_v<T, tf32>)
      return masked(of(k % 4)[k / 4]);
    else
      return half(of(k % 8 / 2)[k / 8], k);
  }
};

}  // namespace host

inline Pack<uint32_t, 4> ldmatrix(const void* row, host::Site site = host::Site::current()) {
  return host::ldmatrix<false>(row, site);
}
inline Pack<uint32_t, 4> ldmatrix_transposed(const void* row,
                                             host::Site site = host::Site::current()) {
  return host::ldmatrix<true>(row, site);
}

// To nearest, ties away from zero; NaN stays NaN.
inline uint32_t to_tf32(float value) {
  if (value != value) return 0x7FFFFFFFu;
  return (weft::detail::bit_cast<uint32_t>(value) + 0x1000u) & 0xFFFFE000u;
}

template <class T>
void mma(typename Mma<T>::C& c, const typename Mma<T>::A& a, const typename Mma<T>::B& b,
         host::Site site = host::Site::current()) {
  using Parts = host::Parts<T>;
  static_assert(sizeof(Parts) <= host::kSlotBytes);
  const Parts own{a, b};
  host::exchange(&own, sizeof(own), site);
  const void* parts = host::slot(0);
  constexpr int kK = Mma<T>::kK;
  constexpr int kValues = Mma<T>::kM * Mma<T>::kN / 32;
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < kValues; ++i)
    for (int k = 0; k < kK; ++k)
      c[i] += Parts::a_at(parts, g + i / 2 * 8, k) * Parts::b_at(parts, k, 2 * t + i % 2);
}

}  // namespace weft::device
