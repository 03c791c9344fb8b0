// The activation that may follow a convolution, on CPU: in place on rows that were just written and
// are still in the cache. They were rounded to the element type first, so that a fused layer has
// the bits of the two in sequence.
#pragma once

#include "conv/conv.h"
#include "core/simd.h"
#include "core/vec_math.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T, class Body>
WEFT_INLINE void map_row(T* row, int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(row + i, body(load_vec(row + i)));
  if (i == count) return;
  const auto left = static_cast<int>(count - i);
  store_part(row + i, body(load_part(row + i, left)), left);
}

template <class T>
void activate_row(const ConvProblem& p, T* row, int64_t count) {
  using V = Vec<accumulate_t<T>>;
  const auto slope = static_cast<accumulate_t<T>>(p.slope);
  switch (p.activation) {
    case Activation::none:
      return;
    case Activation::relu:  // NaN stays NaN
      return map_row(row, count,
                     [](V x) __attribute__((always_inline)) { return x <= 0 ? V{} : x; });
    case Activation::leaky_relu:
      return map_row(row, count,
                     [&](V x) __attribute__((always_inline)) { return x > 0 ? x : x * slope; });
    case Activation::tanh:
      return map_row(row, count, [](V x) __attribute__((always_inline)) { return vec_tanh(x); });
    case Activation::sigmoid:
      return map_row(row, count, [](V x) __attribute__((always_inline)) { return vec_sigmoid(x); });
  }
}

// out = gy times the activation's derivative, which y alone tells.
template <class T>
void activation_grad_row(const ConvProblem& p, const T* gy, const T* y, T* out, int64_t count) {
  using V = Vec<accumulate_t<T>>;
  const auto slope = static_cast<accumulate_t<T>>(p.slope);
  const auto map = [&](const auto& body) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>)
      store_vec(out + i, body(load_vec(gy + i), load_vec(y + i)));
    if (i == count) return;
    const auto left = static_cast<int>(count - i);
    store_part(out + i, body(load_part(gy + i, left), load_part(y + i, left)), left);
  };
  switch (p.activation) {
    case Activation::none:
      return map([](V g, V) __attribute__((always_inline)) { return g; });
    case Activation::relu:  // NaN lets the gradient pass, as torch does
      return map([](V g, V s) __attribute__((always_inline)) { return s <= 0 ? V{} : g; });
    case Activation::leaky_relu:
      return map([&](V g, V s) __attribute__((always_inline)) { return s > 0 ? g : g * slope; });
    case Activation::tanh:
      return map([](V g, V s) __attribute__((always_inline)) { return g * (1 - s * s); });
    case Activation::sigmoid:
      return map([](V g, V s) __attribute__((always_inline)) { return g * (1 - s) * s; });
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
