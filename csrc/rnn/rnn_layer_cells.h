// The cells of a recurrent layer for one hidden unit: a step and its backward, in numbers of any
// kind. `M` says which: M::Number, M::sigmoid, M::tanh, M::relu, M::where_positive, M::one.
//
// The formulas stand once. On dual numbers the same lines are the derivative of the step and of its
// backward, which is all that double backward needs.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "rnn/cell_math.h"
#include "rnn/rnn_layer.h"

namespace weft {

// ---- numbers -----------------------------------------------------------------------------------

template <class V>
WEFT_HD Dual<V> operator*(V a, Dual<V> b) {
  return {a * b.value, a * b.derivative};
}

// 1 / sqrt(x).
WEFT_HD float inverse_root(float x) { return 1 / std::sqrt(x); }
WEFT_HD double inverse_root(double x) { return 1 / std::sqrt(x); }
template <class V>
WEFT_HD Dual<V> inverse_root(Dual<V> x) {
  const V root = inverse_root(x.value);
  return {root, root * root * root * x.derivative * V{-0.5}};
}

// The functions of M on dual numbers.
template <class M>
struct DualMath {
  using Value = typename M::Number;
  using Number = Dual<Value>;
  static constexpr bool kDual = true;

  static WEFT_HD Number one() { return {M::one(), Value{}}; }
  static WEFT_HD Number sigmoid(Number x) {
    const Value y = M::sigmoid(x.value);
    return {y, sigmoid_slope(y, M::one()) * x.derivative};
  }
  static WEFT_HD Number tanh(Number x) {
    const Value y = M::tanh(x.value);
    return {y, tanh_slope(y, M::one()) * x.derivative};
  }
  static WEFT_HD Number relu(Number x) {
    return {M::relu(x.value), M::where_positive(x.value, x.derivative)};
  }
  static WEFT_HD Number where_positive(Number y, Number x) {
    return {M::where_positive(y.value, x.value), M::where_positive(y.value, x.derivative)};
  }
};

// ---- what a step of one unit is made of
// ----------------------------------------------------------

template <class N>
struct StepArguments {
  N x[4], q[4];  // the sums of W_ih x + b_ih and of W_hh h + b_hh
  N h, c;        // the state before
  N peephole[3];
};

template <class N>
struct StepResults {
  N kept[4];
  N h, c;
};

template <class N>
struct BackwardArguments {
  N kept[4];
  N h, c, next_c;
  N peephole[3];
  N grad_h, grad_c;  // of the state after
};

template <class N>
struct BackwardResults {
  N x[4], q[4];  // of the sums; cells that add the two give x alone
  N h, c;        // of the state before, what does not go through the sums
  N peephole[3];
};

// ---- cells
// ---------------------------------------------------------------------------------------

enum class Peephole : uint8_t { none, standard, previous };

// i, f, g, o: c' = f c + i g, h' = o tanh(c'). With peepholes i and f see p c, and o sees p c' or,
// "previous", p c (Gers and Schmidhuber 2000).
template <Peephole kPeephole>
struct LstmLayer {
  static constexpr int kGates = 4, kKept = 4;
  static constexpr bool kHasCell = true, kHasPeephole = kPeephole != Peephole::none;
  static constexpr bool kTwoSums = false, kResetBefore = false;
  static constexpr int kOutputGate = 3;

  template <class M, class N = typename M::Number>
  static WEFT_HD N cell_after(const N (&kept)[4], N c) {
    return kept[1] * c + kept[0] * kept[2];
  }

  // Of a forward step everything but h.
  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> until_cell(const StepArguments<N>& s) {
    N sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = s.x[i] + s.q[i];
    if constexpr (kHasPeephole) {
      sum[0] = sum[0] + s.peephole[0] * s.c;
      sum[1] = sum[1] + s.peephole[1] * s.c;
    }
    StepResults<N> r = {};
    r.kept[0] = M::sigmoid(sum[0]), r.kept[1] = M::sigmoid(sum[1]), r.kept[2] = M::tanh(sum[2]);
    r.c = cell_after<M>(r.kept, s.c);
    if constexpr (kPeephole == Peephole::standard) sum[3] = sum[3] + s.peephole[2] * r.c;
    if constexpr (kPeephole == Peephole::previous) sum[3] = sum[3] + s.peephole[2] * s.c;
    r.kept[3] = M::sigmoid(sum[3]);
    return r;
  }
  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> forward(const StepArguments<N>& s) {
    StepResults<N> r = until_cell<M>(s);
    r.h = r.kept[kOutputGate] * M::tanh(r.c);
    return r;
  }

  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> backward(const BackwardArguments<N>& s) {
    const N one = M::one(), i = s.kept[0], f = s.kept[1], g = s.kept[2], o = s.kept[3];
    const N t = M::tanh(s.next_c);
    BackwardResults<N> r = {};
    r.x[3] = s.grad_h * t * sigmoid_slope(o, one);
    N grad_next = s.grad_c + s.grad_h * o * tanh_slope(t, one);
    if constexpr (kPeephole == Peephole::standard) grad_next = grad_next + r.x[3] * s.peephole[2];
    r.x[0] = grad_next * g * sigmoid_slope(i, one);
    r.x[1] = grad_next * s.c * sigmoid_slope(f, one);
    r.x[2] = grad_next * i * tanh_slope(g, one);
    r.c = grad_next * f;
    if constexpr (kHasPeephole) {
      r.c = r.c + r.x[0] * s.peephole[0] + r.x[1] * s.peephole[1];
      r.peephole[0] = r.x[0] * s.c;
      r.peephole[1] = r.x[1] * s.c;
      r.peephole[2] = r.x[3] * (kPeephole == Peephole::standard ? s.next_c : s.c);
    }
    if constexpr (kPeephole == Peephole::previous) r.c = r.c + r.x[3] * s.peephole[2];
    return r;
  }
};

// f, g, o: c' = f c + (1 - f) g, h' = o tanh(c') (Greff et al. 2015, "CIFG").
struct CoupledLayer {
  static constexpr int kGates = 3, kKept = 3;
  static constexpr bool kHasCell = true, kHasPeephole = false;
  static constexpr bool kTwoSums = false, kResetBefore = false;
  static constexpr int kOutputGate = 2;

  template <class M, class N = typename M::Number>
  static WEFT_HD N cell_after(const N (&kept)[4], N c) {
    return kept[0] * c + (M::one() - kept[0]) * kept[1];
  }

  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> until_cell(const StepArguments<N>& s) {
    StepResults<N> r = {};
    r.kept[0] = M::sigmoid(s.x[0] + s.q[0]);
    r.kept[1] = M::tanh(s.x[1] + s.q[1]);
    r.kept[2] = M::sigmoid(s.x[2] + s.q[2]);
    r.c = cell_after<M>(r.kept, s.c);
    return r;
  }
  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> forward(const StepArguments<N>& s) {
    StepResults<N> r = until_cell<M>(s);
    r.h = r.kept[kOutputGate] * M::tanh(r.c);
    return r;
  }

  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> backward(const BackwardArguments<N>& s) {
    const N one = M::one(), f = s.kept[0], g = s.kept[1], o = s.kept[2], t = M::tanh(s.next_c);
    const N grad_next = s.grad_c + s.grad_h * o * tanh_slope(t, one);
    BackwardResults<N> r = {};
    r.x[0] = grad_next * (s.c - g) * sigmoid_slope(f, one);
    r.x[1] = grad_next * (one - f) * tanh_slope(g, one);
    r.x[2] = s.grad_h * t * sigmoid_slope(o, one);
    r.c = grad_next * f;
    return r;
  }
};

// r, z, n, and of n the hidden state's part q: n = tanh(x_n + r q), h' = n + z (h - n).
struct GruLayer {
  static constexpr int kGates = 3, kKept = 4;
  static constexpr bool kHasCell = false, kHasPeephole = false;
  static constexpr bool kTwoSums = true, kResetBefore = false;

  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> forward(const StepArguments<N>& s) {
    StepResults<N> r = {};
    r.kept[0] = M::sigmoid(s.x[0] + s.q[0]);
    r.kept[1] = M::sigmoid(s.x[1] + s.q[1]);
    r.kept[2] = M::tanh(s.x[2] + r.kept[0] * s.q[2]);
    r.kept[3] = s.q[2];
    r.h = gru_next_hidden(r.kept[1], r.kept[2], s.h);
    return r;
  }

  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> backward(const BackwardArguments<N>& s) {
    const GruGradient<N> g =
        gru_backward<N>({s.kept[0], s.kept[1], s.kept[2], s.kept[3]}, s.h, s.grad_h, M::one());
    BackwardResults<N> r = {};
    r.x[0] = r.q[0] = g.gates.r;
    r.x[1] = r.q[1] = g.gates.z;
    r.x[2] = g.gates.n, r.q[2] = g.gates.q;
    r.h = g.h;
    return r;
  }
};

// r, z, n, the reset gate before the product: n = tanh(x_n + U_n (r h)), h' = n + z (h - n) (Cho et
// al. 2014). A step has two products, so it comes in parts: the first makes r, z and r h.
struct GruResetBeforeLayer {
  static constexpr int kGates = 3, kKept = 3;
  static constexpr bool kHasCell = false, kHasPeephole = false;
  static constexpr bool kTwoSums = false, kResetBefore = true;

  // kept[0] and kept[1]; h is what r multiplies.
  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> forward(const StepArguments<N>& s) {
    StepResults<N> r = {};
    r.kept[0] = M::sigmoid(s.x[0] + s.q[0]);
    r.kept[1] = M::sigmoid(s.x[1] + s.q[1]);
    r.h = r.kept[0] * s.h;
    return r;
  }
  // x[1] and x[2], and h, of the second part.
  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> backward(const BackwardArguments<N>& s) {
    const N one = M::one(), z = s.kept[1], n = s.kept[2];
    BackwardResults<N> r = {};
    r.x[1] = s.grad_h * (s.h - n) * sigmoid_slope(z, one);
    r.x[2] = s.grad_h * (one - z) * tanh_slope(n, one);
    r.h = s.grad_h * z;
    return r;
  }
  // x[0], and h, of the first part; `grad` is that of r h.
  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> first_backward(N r, N h, N grad) {
    BackwardResults<N> result = {};
    result.x[0] = grad * h * sigmoid_slope(r, M::one());
    result.h = grad * r;
    return result;
  }
};

// h' = tanh or relu of the sum, which is all that backward needs of it.
template <bool kRelu>
struct ElmanLayer {
  static constexpr int kGates = 1, kKept = 1;
  static constexpr bool kHasCell = false, kHasPeephole = false;
  static constexpr bool kTwoSums = false, kResetBefore = false;

  template <class M, class N = typename M::Number>
  static WEFT_HD StepResults<N> forward(const StepArguments<N>& s) {
    StepResults<N> r = {};
    const N sum = s.x[0] + s.q[0];
    if constexpr (kRelu) {
      r.h = M::relu(sum);
    } else {
      r.h = M::tanh(sum);
    }
    r.kept[0] = r.h;
    return r;
  }

  template <class M, class N = typename M::Number>
  static WEFT_HD BackwardResults<N> backward(const BackwardArguments<N>& s) {
    BackwardResults<N> r = {};
    if constexpr (kRelu) {
      r.x[0] = M::where_positive(s.kept[0], s.grad_h);
    } else {
      r.x[0] = s.grad_h * tanh_slope(s.kept[0], M::one());
    }
    return r;
  }
};

// Calls `body` with the cell's type.
template <class Body>
inline __attribute__((always_inline)) void dispatch_cell(LayerCell cell, Body&& body) {
  switch (cell) {
    case LayerCell::lstm:
      return body(LstmLayer<Peephole::none>{});
    case LayerCell::lstm_peephole:
      return body(LstmLayer<Peephole::standard>{});
    case LayerCell::lstm_peephole_previous:
      return body(LstmLayer<Peephole::previous>{});
    case LayerCell::lstm_coupled:
      return body(CoupledLayer{});
    case LayerCell::gru:
      return body(GruLayer{});
    case LayerCell::gru_reset_before:
      return body(GruResetBeforeLayer{});
    case LayerCell::tanh:
      return body(ElmanLayer<false>{});
    case LayerCell::relu:
      return body(ElmanLayer<true>{});
  }
}

}  // namespace weft
