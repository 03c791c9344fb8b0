// What the backward of a step does for one hidden unit of one row: rnn_layer_unit.h in reverse. For
// .cu files alone.
#pragma once

#include "rnn/rnn_layer_unit.h"

namespace weft::WEFT_TARGET {
namespace {

// Tensors of one step.
struct GateInputs {
  int64_t time;
  Numbers grad_output, gates, cells, c_before, h_before, peephole;
  LayerMasks masks;
};
WEFT_DEVICE bool is_past(const GateInputs& t, int64_t row) {
  return t.masks.lengths && t.time >= load(t.masks.lengths + row);
}
WEFT_DEVICE bool is_fresh(const GateInputs& t, int64_t row) {
  return t.masks.resets && load(t.masks.resets + row);
}

template <class T>
struct GateOutputs {
  Written<T> grad_sums, grad_hidden_sums, unprojected;
};

// The gradient of a state, and what of it passes on to the one before.
template <class N>
struct StateGradient {
  N grad, zoned;
};

// Of a new state before zoneout; `grad_h` is that of the state after it.
template <class M, class T, class N = typename M::Number>
WEFT_DEVICE StateGradient<N> state_gradient(const LayerProblem& p, const GateInputs& t,
                                            int64_t element, N grad_h) {
  using Acc = accumulate_t<T>;
  const N grad = grad_h + load_number<M, T>(t.grad_output, element);
  if (p.zoneout == 0) return {grad, N{}};
  const Acc z = zone<T>(p, t.masks.zone_h, element);
  return {(Acc{1} - z) * grad, z * grad};
}

// Of an element of the projected state [B, P].
template <class M, class T, class N = typename M::Number>
WEFT_DEVICE StateGradient<N> project_backward(const LayerProblem& p, const GateInputs& t,
                                              int64_t row, int64_t element, N grad_h) {
  if (is_past(t, row)) return {N{}, grad_h};
  StateGradient<N> found = state_gradient<M, T>(p, t, element, grad_h);
  if (is_fresh(t, row)) found.zoned = N{};
  return found;
}

// After the product with U_n: `of_reset` is the gradient of r h. Returns `direct` with its part.
template <class M, class T, class N = typename M::Number>
WEFT_DEVICE N reset_backward(const LayerProblem& p, const GateInputs& t, int64_t row, int64_t unit,
                             N of_reset, N direct, const Written<T>& grad_sums) {
  using Cell = GruResetBeforeLayer;
  if (is_past(t, row) || is_fresh(t, row)) return direct;
  const int64_t at = row * p.hidden + unit;
  const void* dropout = t.masks.dropout;
  N h = load_number<M, T>(t.h_before, at);
  if (dropout) h = load_or_zero<T>(dropout, at) * h;
  BackwardResults<N> r = Cell::template first_backward<M>(
      load_number<M, T>(t.gates, row * Cell::kKept * p.hidden + unit), h, of_reset);
  if (dropout) r.h = load_or_zero<T>(dropout, at) * r.h;
  put<M>(grad_sums, row * Cell::kGates * p.hidden + unit, r.x[0]);
  return direct + r.h;
}

// Of the state before, what does not go through the sums; of the peepholes what the step adds.
template <class N>
struct UnitGradient {
  N h, c, peephole[3];
};

// Gradients of one step's gates. With a projection `grad_h` is that of the unprojected state, which
// itself goes to `unprojected`.
template <class Cell, class M, class T, class N = typename M::Number>
WEFT_DEVICE UnitGradient<N> gates_backward(const LayerProblem& p, const GateInputs& t, int64_t row,
                                           int64_t unit, N grad_h, N grad_c,
                                           const GateOutputs<T>& out) {
  using Acc = accumulate_t<T>;
  const int64_t at = row * p.hidden + unit;
  const auto set = [&](int gate, N of_x, N of_h) {
    const int64_t place = (row * Cell::kGates + gate) * p.hidden + unit;
    put<M>(out.grad_sums, place, of_x);
    if (Cell::kTwoSums) put<M>(out.grad_hidden_sums, place, of_h);
  };
  if (is_past(t, row)) {
    for (int g = 0; g < Cell::kGates; ++g) set(g, N{}, N{});
    put<M>(out.unprojected, at, N{});
    return {grad_h, grad_c, {}};
  }
  const bool fresh = is_fresh(t, row);
  BackwardArguments<N> s = {};
  N zoned_h = {}, zoned_c = {};
  s.grad_h = grad_h;
  if (p.projection == 0) {
    const StateGradient<N> found = state_gradient<M, T>(p, t, at, grad_h);
    s.grad_h = found.grad, zoned_h = found.zoned;
  }
  for (int i = 0; i < Cell::kKept; ++i)
    s.kept[i] = load_number<M, T>(t.gates, (row * Cell::kKept + i) * p.hidden + unit);
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = load_number<M, T>(t.c_before, at);
    s.next_c = load_number<M, T>(t.cells, at);
    s.grad_c = grad_c;
    if (p.zoneout > 0) {
      const Acc z = zone<T>(p, t.masks.zone_c, at);
      zoned_c = z * s.grad_c;
      s.grad_c = (Acc{1} - z) * s.grad_c;
      s.next_c = Cell::template cell_after<M>(s.kept, s.c);
    }
    if (out.unprojected.value)
      put<M>(out.unprojected, at, s.kept[Cell::kOutputGate] * M::tanh(s.next_c));
  }
  if constexpr (Cell::kTwoSums || Cell::kResetBefore) s.h = load_number<M, T>(t.h_before, at);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) s.peephole[i] = load_number<M, T>(t.peephole, i * p.hidden + unit);
  }
  const BackwardResults<N> r = Cell::template backward<M>(s);
  for (int g = 0; g < Cell::kGates; ++g) set(g, r.x[g], r.q[g]);
  UnitGradient<N> before = {};
  for (int i = 0; i < 3; ++i) before.peephole[i] = r.peephole[i];
  if (!fresh) before.h = r.h + zoned_h, before.c = r.c + zoned_c;
  return before;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
