// Layer normalisation of one block of H numbers on CPU: mean and variance in two passes over what
// is in the cache anyway. Sums are by lanes, then pairwise, in an order that depends on H alone.
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

template <class N>
struct Moments {
  N mean, scale;  // scale: 1 / sqrt(variance + eps)
};

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

template <class N, class Acc>
WEFT_INLINE Moments<N> moments_of(N mean, N squares, Acc count) {
  N variance = divided(lane_sum(squares), count);
  if constexpr (requires { variance.derivative; }) {
    variance.value += static_cast<Acc>(kNormEpsilon);
  } else {
    variance += static_cast<Acc>(kNormEpsilon);
  }
  return {mean, inverse_root_of(variance)};
}

// out = scale * (x - mean) / sqrt(variance + eps); x and out are wide, and may be the same. x goes
// to `kept` as it is, if that is not null.
template <class M, class T>
WEFT_INLINE void normalise_block(const Numbers& x, const Numbers& scale, int64_t size,
                                 const NumbersOut& out, const NumbersOut& kept) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const auto count = static_cast<Acc>(size);
  N sum = {}, squares = {};
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N number = load_number<M, Acc>(x, unit, lanes);
    if (kept.value) store_number<M, T>(kept, unit, number, lanes);
    sum = sum + number;
  });
  const N mean = divided(lane_sum(sum), count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N d = centred<M, Acc>(x, unit, lanes, mean);
    squares = squares + d * d;
  });
  const Moments<N> found = moments_of(mean, squares, count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N number = (load_number<M, Acc>(x, unit, lanes) - found.mean) * found.scale;
    store_number<M, Acc>(out, unit, load_number<M, T>(scale, unit, lanes) * number, lanes);
  });
}

// The gradient of x; that of the scale by this block is added to `grad_scale`, which is wide.
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
  N numbers = {}, squares = {}, sum = {}, along = {};
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    numbers = numbers + load_number<M, T>(x, unit, lanes);
    sum = sum + scaled(unit, lanes);
  });
  const N mean = divided(lane_sum(numbers), count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N d = centred<M, T>(x, unit, lanes, mean);
    squares = squares + d * d;
    along = along + scaled(unit, lanes) * d;
  });
  const Moments<N> found = moments_of(mean, squares, count);
  sum = divided(lane_sum(sum), count);
  along = divided(lane_sum(along) * found.scale, count);
  each_part<T>(size, [&](int64_t unit, int lanes) __attribute__((always_inline)) {
    const N n = centred<M, T>(x, unit, lanes, mean) * found.scale;
    store_number<M, T>(grad_x, unit, found.scale * (scaled(unit, lanes) - sum - n * along), lanes);
    const N before = load_number<M, Acc>(grad_scale, unit, lanes);
    store_number<M, Acc>(grad_scale, unit, before + load_number<M, T>(grad, unit, lanes) * n,
                         lanes);
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
