// Backward of a recurrent layer on CPU, for numbers of either kind; see rnn_layer_cpu.cpp.
#pragma once

#include "rnn/rnn_layer_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
struct BackwardOperands {
  using Acc = accumulate_t<T>;
  const LayerProblem& p;
  const LayerBackward& t;
  NumbersOut sums;  // [2, B, gates * H] where T is not wide

  int64_t state(const At& at) const { return at.row * p.hidden + at.unit; }
  int64_t whole(const At& at, int64_t columns = 1) const {
    return (at.time * p.batch + at.row) * columns * p.hidden + at.unit;
  }
  const NumbersOut& hidden_sums() const {
    return t.grad_hidden_sums.value ? t.grad_hidden_sums : t.grad_sums;
  }
  // What the product reads: the gradients themselves, or a wide copy of this step's.
  Numbers fed(int64_t time) const {
    const bool wide = sizeof(T) == sizeof(Acc);
    const Numbers from = wide ? hidden_sums() : sums;
    const int64_t offset = (wide ? time : time % 2) * p.batch * p.gates() * p.hidden;
    return {static_cast<const Acc*>(from.value) + offset,
            from.derivative ? static_cast<const Acc*>(from.derivative) + offset : nullptr};
  }
  template <class M>
  WEFT_INLINE void store_sum(const At& at, int gate, typename M::Number of_x,
                             typename M::Number of_h) const {
    const int64_t place = whole(at, p.gates()) + gate * p.hidden;
    store_number<M, T>(t.grad_sums, place, of_x, at.count);
    if (t.grad_hidden_sums.value) store_number<M, T>(t.grad_hidden_sums, place, of_h, at.count);
    if constexpr (sizeof(T) != sizeof(Acc)) {
      const int64_t row = (at.time % 2 * p.batch + at.row) * p.gates() + gate;
      store_units(static_cast<Acc*>(sums.value) + row * p.hidden + at.unit, rounded<T>(of_h),
                  at.count);
    }
  }
  // c before the step.
  template <class M>
  WEFT_INLINE typename M::Number c_before(const At& at) const {
    if (at.fresh) return typename M::Number{};
    const int64_t before = at.time + (p.reverse ? 1 : -1);
    if (before < 0 || before >= p.steps) return load_number<M, T>(t.c0, state(at), at.count);
    return load_number<M, T>(t.cells, (before * p.batch + at.row) * p.hidden + at.unit, at.count);
  }
};

// Gradients of the sums of one vector of units; leaves in grad_h what does not go through them.
template <class Cell, class M, class T>
WEFT_INLINE void step_back(const BackwardOperands<T>& o, const At& at) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const int64_t state = o.state(at), hidden = o.p.hidden;
  BackwardArguments<N> s = {};
  s.grad_h = load_number<M, Acc>(o.t.grad_h, state, at.count) +
             load_number<M, T>(o.t.grad_output, o.whole(at), at.count);
  for (int i = 0; i < Cell::kKept; ++i)
    s.kept[i] = load_number<M, T>(o.t.gates, o.whole(at, Cell::kKept) + i * hidden, at.count);
  if constexpr (Cell::kHasCell) {
    s.c = o.template c_before<M>(at);
    s.grad_c = load_number<M, Acc>(o.t.grad_c, state, at.count);
    s.next_c = load_number<M, T>(o.t.cells, o.whole(at), at.count);
  }
  if constexpr (Cell::kTwoSums) s.h = load_number<M, T>(o.t.h_before, o.whole(at), at.count);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(o.t.peephole, i * hidden + at.unit, at.count);
  }
  N zoned_h = {}, zoned_c = {};
  if (o.p.zoneout > 0) {
    const auto z = zone<T>(o.p, o.t.masks.zone_h, at);
    zoned_h = z * s.grad_h;
    s.grad_h = (1 - z) * s.grad_h;
    if constexpr (Cell::kHasCell) {
      const auto zc = zone<T>(o.p, o.t.masks.zone_c, at);
      zoned_c = zc * s.grad_c;
      s.grad_c = (1 - zc) * s.grad_c;
      s.next_c = Cell::template cell_after<M>(s.kept, s.c);
    }
  }
  const BackwardResults<N> r = Cell::template backward<M>(s);
  for (int g = 0; g < Cell::kGates; ++g)
    o.template store_sum<M>(at, g, r.x[g], Cell::kTwoSums ? r.q[g] : r.x[g]);
  store_number<M, Acc>(o.t.grad_h, state, at.fresh ? N{} : r.h + zoned_h, at.count);
  if constexpr (Cell::kHasCell)
    store_number<M, Acc>(o.t.grad_c, state, at.fresh ? N{} : r.c + zoned_c, at.count);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) {
      const int64_t place = (at.row * 3 + i) * hidden + at.unit;
      store_number<M, Acc>(o.t.grad_peephole, place,
                           load_number<M, Acc>(o.t.grad_peephole, place, at.count) + r.peephole[i],
                           at.count);
    }
  }
}

template <int kPanelVectors, class T, bool kDual>
void layer_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using P = Panels<T, kPanelVectors, 1>;
  const int64_t hidden = p.hidden, sums = p.gates() * hidden;
  const WeightLayout layout = {hidden, sums, hidden, 0, 1};
  P w(layout, t.w_hh.value), w_derivative(layout, t.w_hh.derivative);
  Work<Acc> wide(sizeof(T) == sizeof(Acc) ? 0 : 2 * p.batch * sums, kDual);
  const BackwardOperands<T> o = {p, t, wide.at()};

  const int64_t parts = p.batch * sums * hidden / kStepGrain;
  parallel_team(context, parts < w.count() ? parts : w.count(), [&](const Team& team) {
    Rows rows(p.batch);
    const int64_t begin = team.begin(w.count()), end = team.end(w.count());
    w.pack(begin, end);
    w_derivative.pack(begin, end);
    const int64_t first_unit = begin * P::kWidth;
    const int64_t last_unit = end * P::kWidth < hidden ? end * P::kWidth : hidden;
    rows.at_time(0, p.batch, {});
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      const int64_t time = p.time(s);
      if (t.masks.lengths || t.masks.resets) rows.at_time(time, p.batch, t.masks);
      dispatch_cell(p.cell, [&](auto cell) {
        using Cell = decltype(cell);
        for (int64_t i = 0; i < p.batch; ++i) {
          for (int64_t unit = first_unit; unit < last_unit; unit += P::kLane) {
            const int64_t left = hidden - unit;
            const At at = {time, rows.order[i], unit,
                           static_cast<int>(left < P::kLane ? left : P::kLane), i >= rows.fed};
            if (i < rows.active) {
              step_back<Cell, M>(o, at);
            } else {
              const typename M::Number zero = {};
              for (int g = 0; g < Cell::kGates; ++g) o.template store_sum<M>(at, g, zero, zero);
            }
          }
        }
      });
      team.barrier();
      multiply<M>(w, w_derivative, o.fed(time), rows.order.data(), rows.fed, begin, end,
                  [&](int64_t row, int64_t unit, int count, const auto& sum)
                      __attribute__((always_inline)) {
                        const int64_t at = row * hidden + unit;
                        auto grad = sum(0);
                        if (const void* dropout = t.masks.dropout)
                          grad = load_units(static_cast<const T*>(dropout) + at, count) * grad;
                        store_number<M, Acc>(
                            t.grad_h, at, load_number<M, Acc>(t.grad_h, at, count) + grad, count);
                      });
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
