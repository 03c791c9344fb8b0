// What a step of a recurrent layer does for one hidden unit of one row once its products are there:
// masks, cell, zoneout, and what is kept. The kernel of a step and the kernel of a whole sequence
// share it. For .cu files alone.
#pragma once

#include "rnn/rnn_layer_tile.h"

namespace weft::WEFT_TARGET {
namespace {

// A tensor that is written, and its derivative; not written if null.
template <class T>
struct Written {
  T* value = nullptr;
  T* derivative = nullptr;
};
template <class M, class T>
WEFT_DEVICE void put(const Written<T>& to, int64_t offset, typename M::Number number) {
  if (to.value) store_number<M>(to.value, to.derivative, offset, number);
}

// Of one step. With an inner product its factor goes to `inner` [2, B, H], with z of a GRU that
// resets before as the second, and the state is left to finish_unit.
template <class T>
struct StepOutputs {
  Written<T> h, c, output, cells, gates, inner;
};

// Which step, and what it takes of the state; `normalised`: products come with their normalisation,
// so that those of a fresh row are zeros already.
struct StepPlace {
  int64_t time;
  LayerMasks masks;
  bool normalised;
};

template <class N>
struct UnitWeights {
  N b_ih[4], b_hh[4], peephole[3];
};
template <class Cell, class M, class T, class N = typename M::Number>
WEFT_DEVICE UnitWeights<N> load_weights(const LayerProblem& p, int64_t unit, const Numbers& b_ih,
                                        const Numbers& b_hh, const Numbers& peephole) {
  UnitWeights<N> w = {};
  for (int g = 0; g < Cell::kGates; ++g) {
    w.b_ih[g] = load_number<M, T>(b_ih, g * p.hidden + unit);
    w.b_hh[g] = load_number<M, T>(b_hh, g * p.hidden + unit);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) w.peephole[i] = load_number<M, T>(peephole, i * p.hidden + unit);
  }
  return w;
}

// The state of a unit; h is nothing where it is projected.
template <class N>
struct UnitState {
  N h, c;
};

// The row has no step at this time.
WEFT_DEVICE bool is_past(const StepPlace& at, int64_t row) {
  return at.masks.lengths && at.time >= load(at.masks.lengths + row);
}
WEFT_DEVICE bool is_fresh(const StepPlace& at, int64_t row) {
  return at.masks.resets && load(at.masks.resets + row);
}

template <class M, class T, class N = typename M::Number>
WEFT_DEVICE N finish_state(const LayerProblem& p, const LayerMasks& masks, int64_t element, N old,
                           N h, const StepOutputs<T>& out) {
  using Acc = accumulate_t<T>;
  if (p.zoneout > 0) {
    const Acc z = zone<T>(p, masks.zone_h, element);
    h = z * old + (Acc{1} - z) * h;
  }
  put<M>(out.h, element, h);
  put<M>(out.output, element, h);
  return h;
}

// `x` are the sums of W_ih x, `sum` those of W_hh h; returns the state after.
template <class Cell, class M, class T, class N = typename M::Number>
WEFT_DEVICE UnitState<N> step_unit(const LayerProblem& p, const StepPlace& at, int64_t row,
                                   int64_t unit, const UnitWeights<N>& w, const N (&x)[4],
                                   const N (&sum)[kSums], UnitState<N> before,
                                   const StepOutputs<T>& out) {
  using Acc = accumulate_t<T>;
  constexpr int kGates = Cell::kResetBefore ? 2 : Cell::kGates;
  const int64_t element = row * p.hidden + unit;
  const auto keep = [&](int i, N kept) {
    put<M>(out.gates, (row * Cell::kKept + i) * p.hidden + unit, kept);
  };
  if (is_past(at, row)) {
    if constexpr (Cell::kHasCell) {
      put<M>(out.c, element, before.c);
      put<M>(out.cells, element, before.c);
    }
    for (int i = 0; i < Cell::kKept; ++i) keep(i, N{});
    if (p.has_inner()) {
      put<M>(out.inner, element, N{});
      if (Cell::kResetBefore) put<M>(out.inner, p.units() + element, N{});
    } else {
      put<M>(out.h, element, before.h);
      put<M>(out.output, element, N{});
    }
    return before;
  }
  const bool fresh = is_fresh(at, row);
  StepArguments<N> s = {};
  for (int g = 0; g < kGates; ++g) {
    s.x[g] = x[g] + w.b_ih[g];
    s.q[g] = w.b_hh[g];
    if (!fresh || at.normalised) s.q[g] = s.q[g] + sum[g];
  }
  if (!fresh) s.h = before.h;
  const N old = s.h;
  if constexpr (Cell::kResetBefore) {
    if (at.masks.dropout) s.h = load_or_zero<T>(at.masks.dropout, element) * s.h;
  }
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = before.c;
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) s.peephole[i] = w.peephole[i];
  }
  StepResults<N> r = Cell::template forward<M>(s);
  if constexpr (Cell::kHasCell) {
    if (p.zoneout > 0) {
      const Acc z = zone<T>(p, at.masks.zone_c, element);
      r.c = z * s.c + (Acc{1} - z) * r.c;
    }
    put<M>(out.c, element, r.c);
    put<M>(out.cells, element, r.c);
  }
  for (int i = 0; i < (Cell::kResetBefore ? 2 : Cell::kKept); ++i) keep(i, r.kept[i]);
  if (p.has_inner()) {
    put<M>(out.inner, element, r.h);
    if (Cell::kResetBefore) put<M>(out.inner, p.units() + element, r.kept[1]);
    return {before.h, r.c};
  }
  return {finish_state<M>(p, at.masks, element, old, r.h, out), r.c};
}

// After the inner product `sum`: h = W_hr m, or the candidate of a GRU, for which `x` is its sum of
// W_ih x and `z` its gate, and its state. Returns the state after.
template <class Cell, class M, class T, class N = typename M::Number>
WEFT_DEVICE N finish_unit(const LayerProblem& p, const StepPlace& at, int64_t row, int64_t unit,
                          const UnitWeights<N>& w, N x, N z, N sum, N before,
                          const StepOutputs<T>& out) {
  const int64_t element = row * p.state() + unit;
  [[maybe_unused]] const int64_t kept = (row * Cell::kKept + 2) * p.hidden + unit;
  if (is_past(at, row)) {
    put<M>(out.h, element, before);
    put<M>(out.output, element, N{});
    if (Cell::kResetBefore) put<M>(out.gates, kept, N{});
    return before;
  }
  const N old = is_fresh(at, row) ? N{} : before;
  N h = sum;
  if constexpr (Cell::kResetBefore) {
    const N n = M::tanh(x + w.b_ih[2] + (h + w.b_hh[2]));
    put<M>(out.gates, kept, n);
    h = gru_next_hidden(z, n, old);
  }
  return finish_state<M>(p, at.masks, element, old, h, out);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
