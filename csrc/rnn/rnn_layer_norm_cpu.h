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

// x less its mean, for one vector of units; lanes behind the last are zero.
template <class M, class From, class N = typename M::Number>
WEFT_INLINE N centred(const Numbers& x, const At& at, N mean) {
  const N found = load_number<M, From>(x, at.unit, at.count) - mean;
  return at.count == kLanes<From> ? found : first_lanes<accumulate_t<From>>(found, at.count);
}

template <class M, class From>
WEFT_INLINE Moments<typename M::Number> moments(const Numbers& x, int64_t size) {
  using Acc = accumulate_t<From>;
  using N = typename M::Number;
  const auto count = static_cast<Acc>(size);
  N sum = {}, squares = {};
  each_vector<From>(0, 0, false, 0, size,
                    [&](const At& at) { sum = sum + load_number<M, From>(x, at.unit, at.count); });
  const N mean = divided(lane_sum(sum), count);
  each_vector<From>(0, 0, false, 0, size, [&](const At& at) {
    const N d = centred<M, From>(x, at, mean);
    squares = squares + d * d;
  });
  N variance = divided(lane_sum(squares), count);
  if constexpr (M::kDual) {
    variance.value += static_cast<Acc>(kNormEpsilon);
  } else {
    variance += static_cast<Acc>(kNormEpsilon);
  }
  return {mean, inverse_root_of(variance)};
}

// out = scale * (x - mean) / sqrt(variance + eps); x and out are wide, and may be the same.
template <class M, class T>
WEFT_INLINE void normalise_block(const Numbers& x, const Numbers& scale, int64_t size,
                                 const NumbersOut& out) {
  using Acc = accumulate_t<T>;
  const auto found = moments<M, Acc>(x, size);
  each_vector<T>(0, 0, false, 0, size, [&](const At& at) {
    const auto number = (load_number<M, Acc>(x, at.unit, at.count) - found.mean) * found.scale;
    store_number<M, Acc>(out, at.unit, load_number<M, T>(scale, at.unit, at.count) * number,
                         at.count);
  });
}

// The gradients of x, and of the scale by this block.
template <class M, class T>
WEFT_INLINE void normalise_block_back(const Numbers& grad, const Numbers& x, const Numbers& scale,
                                      int64_t size, const NumbersOut& grad_x,
                                      const NumbersOut& grad_scale) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const auto found = moments<M, T>(x, size);
  const auto normal = [&](const At& at) { return centred<M, T>(x, at, found.mean) * found.scale; };
  const auto scaled = [&](const At& at) {
    return load_number<M, T>(grad, at.unit, at.count) * load_number<M, T>(scale, at.unit, at.count);
  };
  N sum = {}, along = {};
  each_vector<T>(0, 0, false, 0, size, [&](const At& at) {
    const N g = scaled(at);
    sum = sum + g;
    along = along + g * normal(at);
  });
  const auto count = static_cast<Acc>(size);
  sum = divided(lane_sum(sum), count), along = divided(lane_sum(along), count);
  each_vector<T>(0, 0, false, 0, size, [&](const At& at) {
    const N n = normal(at);
    store_number<M, T>(grad_x, at.unit, found.scale * (scaled(at) - sum - n * along), at.count);
    store_number<M, T>(grad_scale, at.unit, load_number<M, T>(grad, at.unit, at.count) * n,
                       at.count);
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
