// Forward of a recurrent layer on CPU, for numbers of either kind; see rnn_layer_cpu.cpp.
#pragma once

#include "rnn/rnn_layer_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
struct ForwardOperands {
  const LayerProblem& p;
  const LayerForward& t;
  NumbersOut h[2];    // [B, H]: the state before and after a step, in turn
  NumbersOut fed[2];  // the same as the product sees it
  NumbersOut c;       // [B, H]
  int next;           // which of the two the step in hand writes

  int64_t state(const At& at) const { return at.row * p.hidden + at.unit; }
  int64_t whole(const At& at, int64_t columns = 1) const {
    return (at.time * p.batch + at.row) * columns * p.hidden + at.unit;
  }
};

template <class M, class T>
WEFT_INLINE void store_state(const ForwardOperands<T>& o, const At& at, typename M::Number h) {
  using Acc = accumulate_t<T>;
  store_number<M, Acc>(o.h[o.next], o.state(at), h, at.count);
  if (const void* dropout = o.t.masks.dropout)
    store_number<M, Acc>(o.fed[o.next], o.state(at),
                         load_units(static_cast<const T*>(dropout) + o.state(at), at.count) * h,
                         at.count);
}

// One vector of units; `sum(gate)` is the hidden state's product.
template <class Cell, class M, class T, class Sum>
WEFT_INLINE void take_step(const ForwardOperands<T>& o, const At& at, const Sum& sum) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const int64_t hidden = o.p.hidden;
  StepArguments<N> s = {};
  const int64_t x = (at.time * o.p.batch + at.row) * o.t.sums_row + at.unit;
  for (int g = 0; g < Cell::kGates; ++g) {
    const int64_t gate = g * hidden + at.unit;
    s.x[g] = load_number<M, Acc>(o.t.sums, x + g * hidden, at.count) +
             load_number<M, T>(o.t.b_ih, gate, at.count);
    s.q[g] = load_number<M, T>(o.t.b_hh, gate, at.count);
    if (!at.fresh) s.q[g] = s.q[g] + sum(g);
  }
  if (!at.fresh) s.h = load_number<M, Acc>(o.h[1 - o.next], o.state(at), at.count);
  if constexpr (Cell::kHasCell) {
    if (!at.fresh) s.c = load_number<M, Acc>(o.c, o.state(at), at.count);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(o.t.peephole, i * hidden + at.unit, at.count);
  }
  StepResults<N> r = Cell::template forward<M>(s);
  if (o.p.zoneout > 0) {
    const auto z = zone<T>(o.p, o.t.masks.zone_h, at);
    r.h = z * s.h + (1 - z) * r.h;
    if constexpr (Cell::kHasCell) {
      const auto zc = zone<T>(o.p, o.t.masks.zone_c, at);
      r.c = zc * s.c + (1 - zc) * r.c;
    }
  }
  const N h = rounded<T>(r.h);
  store_state<M>(o, at, h);
  store_number<M, T>(o.t.output, o.whole(at), h, at.count);
  if constexpr (Cell::kHasCell) {
    const N c = rounded<T>(r.c);
    store_number<M, Acc>(o.c, o.state(at), c, at.count);
    if (o.t.cells.value) store_number<M, T>(o.t.cells, o.whole(at), c, at.count);
  }
  if (o.t.gates.value)
    for (int i = 0; i < Cell::kKept; ++i)
      store_number<M, T>(o.t.gates, o.whole(at, Cell::kKept) + i * hidden, r.kept[i], at.count);
}

// A row without this step: zero output, the state as it was.
template <class Cell, class M, class T>
void skip_step(const ForwardOperands<T>& o, const At& at) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  store_state<M>(o, at, load_number<M, Acc>(o.h[1 - o.next], o.state(at), at.count));
  store_number<M, T>(o.t.output, o.whole(at), N{}, at.count);
  if (o.t.cells.value)
    store_number<M, T>(o.t.cells, o.whole(at), load_number<M, Acc>(o.c, o.state(at), at.count),
                       at.count);
  if (o.t.gates.value)
    for (int i = 0; i < Cell::kKept; ++i)
      store_number<M, T>(o.t.gates, o.whole(at, Cell::kKept) + i * o.p.hidden, N{}, at.count);
}

template <class Cell, class T, bool kDual>
void layer_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using P = Panels<T, Cell::kGates == 1 ? 4 : Cell::kGates, Cell::kGates>;
  const int64_t hidden = p.hidden, units = p.units();
  const WeightLayout layout = {hidden, hidden, 1, hidden * hidden, hidden};
  P w(layout, t.w_hh.value), w_derivative(layout, t.w_hh.derivative);
  Work<Acc> states(2 * units, kDual), cell(Cell::kHasCell ? units : 0, kDual);
  Work<Acc> fed(t.masks.dropout ? 2 * units : 0, kDual);
  const Work<Acc>& seen = t.masks.dropout ? fed : states;
  copy_numbers<T, Acc>(t.h0, units, states.at());
  if constexpr (Cell::kHasCell) copy_numbers<T, Acc>(t.c0, units, cell.at());

  const int64_t parts = p.batch * Cell::kGates * hidden * hidden / kStepGrain;
  parallel_team(context, parts < w.count() ? parts : w.count(), [&](const Team& team) {
    ForwardOperands<T> o = {
        p, t, {states.at(), states.at(units)}, {seen.at(), seen.at(units)}, cell.at(), 0};
    Rows rows(p.batch);
    const int64_t begin = team.begin(w.count()), end = team.end(w.count());
    w.pack(begin, end);
    w_derivative.pack(begin, end);
    const auto each_vector = [&](int64_t row, int64_t time, bool fresh, const auto& body) {
      for (int64_t unit = begin * P::kGroups * P::kLane;
           unit < end * P::kGroups * P::kLane && unit < hidden; unit += P::kLane) {
        const int64_t left = hidden - unit;
        body(At{time, row, unit, static_cast<int>(left < P::kLane ? left : P::kLane), fresh});
      }
    };
    if (t.masks.dropout) {
      for (int64_t row = 0; row < p.batch; ++row)
        each_vector(row, 0, false, [&](const At& at) {
          store_state<M>(o, at, load_number<M, Acc>(o.h[0], o.state(at), at.count));
        });
      team.barrier();
    }
    rows.at_time(0, p.batch, {});
    for (int64_t s = 0; s < p.steps; ++s) {
      const int64_t time = p.time(s);
      o.next = static_cast<int>(1 - s % 2);
      if (t.masks.lengths || t.masks.resets) rows.at_time(time, p.batch, t.masks);
      multiply<M>(w, w_derivative, o.fed[1 - o.next], rows.order.data(), rows.fed, begin, end,
                  [&](int64_t row, int64_t unit, int count, const auto& sum) __attribute__((
                      always_inline)) { take_step<Cell, M>(o, At{time, row, unit, count}, sum); });
      for (int64_t i = rows.fed; i < rows.active; ++i)
        each_vector(rows.order[i], time, true, [&](const At& at) {
          take_step<Cell, M>(o, at, [](int) { return typename M::Number{}; });
        });
      for (int64_t i = rows.active; i < p.batch; ++i)
        each_vector(rows.order[i], time, false, [&](const At& at) { skip_step<Cell, M>(o, at); });
      team.barrier();
    }
  });
  copy_numbers<Acc, T>(states.at(p.steps % 2 * units), units, t.h_n);
  if constexpr (Cell::kHasCell) copy_numbers<Acc, T>(cell.at(), units, t.c_n);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
