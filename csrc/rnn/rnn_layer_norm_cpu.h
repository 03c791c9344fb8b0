// Layer normalisation of blocks of H numbers on CPU: mean and variance in two passes over what is
// in the cache anyway. Sums are by lanes, then pairwise, in an order that depends on H alone. A
// block is one chain of sums, a division and a root, so forward some blocks of a row go through it
// side by side; backward that gained nothing.
#pragma once

#include "rnn/rnn_layer_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// In every lane the sum of all.
template <class Acc, int kLane = kLanes<Acc>>
WEFT_INLINE Vec<Acc> lane_sum_of(Vec<Acc> x) {
  for (int i = 1; i < kLane; i *= 2)
    x = evens(x, x) + detail::odds(x, x, detail::lane_indices<Vec<Acc>>{});
  return x;
}
WEFT_INLINE Vec<float> lane_sum(Vec<float> x) { return lane_sum_of<float>(x); }
WEFT_INLINE Vec<double> lane_sum(Vec<double> x) { return lane_sum_of<double>(x); }
template <class V>
WEFT_INLINE Dual<V> lane_sum(Dual<V> x) {
  return {lane_sum(x.value), lane_sum(x.derivative)};
}

template <class V, class Acc>
WEFT_INLINE V divided(V x, Acc by) {
  return x / by;
}
template <class V, class Acc>
WEFT_INLINE Dual<V> divided(Dual<V> x, Acc by) {
  return {x.value / by, x.derivative / by};
}

// Each of the numbers becomes the sum of its lanes, in every lane; the order is that of lane_sum.
// Numbers are paired, so that some cost little more than one.
template <class V, int kCount>
WEFT_INLINE void lane_sums(V (&x)[kCount]) {
  constexpr int kLane = sizeof(V) / sizeof(x[0][0]), kPaired = kCount == 3 ? 4 : kCount;
  if constexpr (kCount == 1 || kPaired > kLane) {
    for (V& one : x) one = lane_sum(one);
  } else {
    static_assert(kPaired == 2 || kPaired == 4);
    const auto pair = [](V a, V b) __attribute__((always_inline)) {
      V even, odd;
      deinterleave(a, b, even, odd);
      return even + odd;
    };
    V all = pair(x[0], x[1]);  // then the numbers' parts one after another
    if constexpr (kPaired == 4) all = pair(all, pair(x[2], x[kCount - 1]));
    for (int parts = kLane / kPaired; parts > 1; parts /= 2) all = pair(all, all);
    for (int i = 0; i < kCount; ++i) x[i] = V{} + all[i];
  }
}
template <class V, int kCount>
WEFT_INLINE void lane_sums(Dual<V> (&x)[kCount]) {
  for (Dual<V>& one : x) one = lane_sum(one);
}

// Of a number that is the same in all lanes.
template <class V>
WEFT_INLINE V inverse_root_of(V x) {
  return V{} + inverse_root(x[0]);
}
template <class V>
WEFT_INLINE Dual<V> inverse_root_of(Dual<V> x) {
  const V root = inverse_root_of(x.value);
  return {root, root * root * root * x.derivative * typename std::decay_t<decltype(root[0])>(-0.5)};
}

// The first `count` lanes, zeros behind.
template <class Acc, class V>
WEFT_INLINE V first_lanes(V x, int count) {
  Acc held[kLanes<Acc>];
  store_vec(held, x);
  return load_part(held, count);
}
template <class Acc, class V>
WEFT_INLINE Dual<V> first_lanes(Dual<V> x, int count) {
  return {first_lanes<Acc>(x.value, count), first_lanes<Acc>(x.derivative, count)};
}

// Calls `body(unit, count)` for each vector of `size` units. Of whole vectors `count` is a
// constant.
template <class T, class Body>
WEFT_INLINE void each_part(int64_t size, const Body& body) {
  int64_t unit = 0;
  for (; unit + kLanes<T> <= size; unit += kLanes<T>) body(unit, static_cast<int>(kLanes<T>));
  if (unit < size) body(unit, static_cast<int>(size - unit));
}

// x less its mean, for one vector of units; lanes behind the last are zero.
template <class M, class From, class N = typename M::Number>
WEFT_INLINE N centred(const Numbers& x, int64_t unit, int count, N mean) {
  const N found = load_number<M, From>(x, unit, count) - mean;
  return count == kLanes<From> ? found : first_lanes<accumulate_t<From>>(found, count);
}

// 1 / sqrt(variance + eps) of the sum of squares, which is the same in all lanes.
template <class N, class Acc>
WEFT_INLINE N inverse_deviation(N squares, Acc count) {
  N variance = divided(squares, count);
  if constexpr (requires { variance.derivative; }) {
    variance.value += static_cast<Acc>(kNormEpsilon);
  } else {
    variance += static_cast<Acc>(kNormEpsilon);
  }
  return inverse_root_of(variance);
}

// Calls `body(first, n)` for runs of n, a constant of at most kMost, of `count` blocks.
template <int kMost, class Body>
WEFT_INLINE void block_runs(int64_t count, const Body& body) {
  int64_t first = 0;
  for (; first + kMost <= count; first += kMost) body(first, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) {
    block_runs<kMost - 1>(count - first,
                          [&](int64_t rest, auto blocks)
                              __attribute__((always_inline)) { body(first + rest, blocks); });
  }
}

// kBlocks blocks of `size`, one after another, side by side: a block alone is one chain of
// operations.
template <int kBlocks, class M, class T>
WEFT_INLINE void normalise_run(const Numbers& x, const Numbers& scale, int64_t size,
                               const NumbersOut& out, const NumbersOut& kept) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const auto count = static_cast<Acc>(size);
  N mean[kBlocks] = {}, deviation[kBlocks] = {};
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const N number = load_number<M, Acc>(x, b * size + unit, lanes);
      if (kept.value) store_number<M, T>(kept, b * size + unit, number, lanes);
      mean[b] = mean[b] + number;
    }
  });
  lane_sums(mean);
  for (N& m : mean) m = divided(m, count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const N d = centred<M, Acc>(x, b * size + unit, lanes, mean[b]);
      deviation[b] = deviation[b] + d * d;
    }
  });
  lane_sums(deviation);
  for (N& d : deviation) d = inverse_deviation(d, count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t at = b * size + unit;
      const N number = (load_number<M, Acc>(x, at, lanes) - mean[b]) * deviation[b];
      store_number<M, Acc>(out, at, load_number<M, T>(scale, at, lanes) * number, lanes);
    }
  });
}

// out = scale * (x - mean) / sqrt(variance + eps) of `blocks` blocks of `size`, one after another;
// x and out are wide, and may be the same. x goes to `kept` as it is, if that is not null.
template <class M, class T>
WEFT_INLINE void normalise_blocks(const Numbers& x, const Numbers& scale, int64_t size,
                                  int64_t blocks, const NumbersOut& out, const NumbersOut& kept) {
  using Acc = accumulate_t<T>;
  block_runs<M::kDual ? 1 : 4>(blocks, [&](int64_t first, auto count) {
    const int64_t at = first * size;
    normalise_run<count, M, T>(part<Acc>(x, at), part<T>(scale, at), size, shifted<Acc>(out, at),
                               shifted<T>(kept, at));
  });
}

template <class M, class T>
WEFT_INLINE void normalise_block_back(const Numbers& grad, const Numbers& x, const Numbers& scale,
                                      int64_t size, const NumbersOut& grad_x,
                                      const NumbersOut& grad_scale) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const auto count = static_cast<Acc>(size);
  const auto scaled = [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    return load_number<M, T>(grad, unit, lanes) * load_number<M, T>(scale, unit, lanes);
  };
  N sums[2] = {};  // of x, of the scaled gradient
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    sums[0] = sums[0] + load_number<M, T>(x, unit, lanes);
    sums[1] = sums[1] + scaled(unit, lanes);
  });
  lane_sums(sums);
  const N mean = divided(sums[0], count), sum = divided(sums[1], count);
  N products[2] = {};  // of x less its mean: with itself, with the scaled gradient
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N d = centred<M, T>(x, unit, lanes, mean);
    products[0] = products[0] + d * d;
    products[1] = products[1] + scaled(unit, lanes) * d;
  });
  lane_sums(products);
  const N deviation = inverse_deviation(products[0], count);
  const N along = divided(products[1] * deviation, count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N n = centred<M, T>(x, unit, lanes, mean) * deviation;
    store_number<M, T>(grad_x, unit, deviation * (scaled(unit, lanes) - sum - n * along), lanes);
    const N before = load_number<M, Acc>(grad_scale, unit, lanes);
    store_number<M, Acc>(grad_scale, unit, before + load_number<M, T>(grad, unit, lanes) * n,
                         lanes);
  });
}

// The gradient of x; that of the scale by these blocks is added to `grad_scale`, which is wide.
template <class M, class T>
WEFT_INLINE void normalise_blocks_back(const Numbers& grad, const Numbers& x, const Numbers& scale,
                                       int64_t size, int64_t blocks, const NumbersOut& grad_x,
                                       const NumbersOut& grad_scale) {
  for (int64_t at = 0; at < blocks * size; at += size)
    normalise_block_back<M, T>(part<T>(grad, at), part<T>(x, at), part<T>(scale, at), size,
                               shifted<T>(grad_x, at), shifted<accumulate_t<T>>(grad_scale, at));
}

}  // namespace
}  // namespace weft::WEFT_TARGET
