// What a recurrent cell computes for one hidden unit once its sums are known: forward, backward and
// double backward, in any number type (a scalar, a vector of lanes, a dual number).
//
// The double backward needs no formulas of its own. Let F be the step from (pre-activations,
// state) to the next state, J its Jacobian; backward is B(g) = J^T g. The gradient of <u, B(g)> is
//   with respect to g:      J u, the derivative of F along u
//   with respect to F's own arguments: the derivative of B along u
// and both derivatives come from running F and B on dual numbers whose derivative part is u.
#pragma once

#include "core/dtype.h"

namespace weft {

// value + derivative * e, e^2 = 0.
template <class V>
struct Dual {
  V value;
  V derivative;
};
template <class V>
WEFT_HD Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.value + b.value, a.derivative + b.derivative};
}
template <class V>
WEFT_HD Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.value - b.value, a.derivative - b.derivative};
}
template <class V>
WEFT_HD Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.value * b.value, a.derivative * b.value + a.value * b.derivative};
}

// y' for y = sigmoid(x) and y = tanh(x).
template <class V>
WEFT_HD V sigmoid_slope(V y, V one) {
  return y * (one - y);
}
// (1 - y)(1 + y): exact to the last place where y is close to 1.
template <class V>
WEFT_HD V tanh_slope(V y, V one) {
  return (one - y) * (one + y);
}

// ---- LSTM: c' = f c + i g, h' = o tanh(c') ----

template <class V>
struct LstmGates {
  V i, f, g, o;
};

template <class V>
WEFT_HD V lstm_next_cell(const LstmGates<V>& s, V c) {
  return s.f * c + s.i * s.g;
}

template <class V>
struct LstmGradient {
  LstmGates<V> gates;  // of the pre-activations
  V c;
};

// `t` is tanh(c').
template <class V>
WEFT_HD LstmGradient<V> lstm_backward(const LstmGates<V>& s, V c, V t, V grad_h, V grad_c, V one) {
  const V grad_next = grad_c + grad_h * s.o * tanh_slope(t, one);
  return {{grad_next * s.g * sigmoid_slope(s.i, one), grad_next * c * sigmoid_slope(s.f, one),
           grad_next * s.i * tanh_slope(s.g, one), grad_h * t * sigmoid_slope(s.o, one)},
          grad_next * s.f};
}

template <class V>
struct LstmSecond {
  V grad_h, grad_c;    // of backward's incoming gradients
  LstmGates<V> gates;  // of the pre-activations
  V c;
};

// `u` and `u_c` weigh backward's results; `t` is tanh(c').
template <class V>
WEFT_HD LstmSecond<V> lstm_double_backward(const LstmGates<V>& s, V c, V t, V grad_h, V grad_c,
                                           const LstmGates<V>& u, V u_c, V zero, V one) {
  using D = Dual<V>;
  const LstmGates<D> gates = {{s.i, sigmoid_slope(s.i, one) * u.i},
                              {s.f, sigmoid_slope(s.f, one) * u.f},
                              {s.g, tanh_slope(s.g, one) * u.g},
                              {s.o, sigmoid_slope(s.o, one) * u.o}};
  const D cell = {c, u_c};
  const D next = lstm_next_cell(gates, cell);
  const D squashed = {t, tanh_slope(t, one) * next.derivative};
  const D hidden = gates.o * squashed;
  const LstmGradient<D> gradient =
      lstm_backward<D>(gates, cell, squashed, {grad_h, zero}, {grad_c, zero}, {one, zero});
  return {hidden.derivative,
          next.derivative,
          {gradient.gates.i.derivative, gradient.gates.f.derivative, gradient.gates.g.derivative,
           gradient.gates.o.derivative},
          gradient.c.derivative};
}

// ---- GRU: n = tanh(xn + r q), h' = n + z (h - n) ----

// The gates as they are kept; as a gradient: of the four sums (r, z, xn, q) before activation.
template <class V>
struct GruGates {
  V r, z, n, q;
};

template <class V>
WEFT_HD V gru_next_hidden(V z, V n, V h) {
  return n + z * (h - n);
}

template <class V>
struct GruGradient {
  GruGates<V> gates;
  V h;  // the part that does not go through the gates
};

template <class V>
WEFT_HD GruGradient<V> gru_backward(const GruGates<V>& s, V h, V grad_h, V one) {
  const V grad_n = grad_h * (one - s.z) * tanh_slope(s.n, one);
  return {{grad_n * s.q * sigmoid_slope(s.r, one), grad_h * (h - s.n) * sigmoid_slope(s.z, one),
           grad_n, grad_n * s.r},
          grad_h * s.z};
}

template <class V>
struct GruSecond {
  V grad_h;  // of backward's incoming gradient
  GruGates<V> gates;
  V h;
};

// `u` and `u_h` weigh backward's results.
template <class V>
WEFT_HD GruSecond<V> gru_double_backward(const GruGates<V>& s, V h, V grad_h, const GruGates<V>& u,
                                         V u_h, V zero, V one) {
  using D = Dual<V>;
  const D r = {s.r, sigmoid_slope(s.r, one) * u.r};
  const D q = {s.q, u.q};
  const D n = {s.n, tanh_slope(s.n, one) * (u.n + (r * q).derivative)};
  const GruGates<D> gates = {r, {s.z, sigmoid_slope(s.z, one) * u.z}, n, q};
  const D hidden = {h, u_h};
  const GruGradient<D> gradient = gru_backward<D>(gates, hidden, {grad_h, zero}, {one, zero});
  return {gru_next_hidden(gates.z, gates.n, hidden).derivative,
          {gradient.gates.r.derivative, gradient.gates.z.derivative, gradient.gates.n.derivative,
           gradient.gates.q.derivative},
          gradient.h.derivative};
}

}  // namespace weft
