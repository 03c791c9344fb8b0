// Backward of a recurrent layer on CPU, for numbers of either kind; see rnn_layer_cpu.cpp.
#pragma once

#include "rnn/rnn_layer_norm_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T, class Term>
struct BackwardOperands {
  using Acc = accumulate_t<T>;
  const LayerProblem& p;
  const LayerBackward& t;
  NumbersOut sums;       // terms [2, B, gates * H] where T is not wide
  NumbersOut projected;  // terms [B, P] where T is not wide

  int64_t cell(const At& at) const { return at.row * p.hidden + at.unit; }
  int64_t state(const At& at) const { return at.row * p.state() + at.unit; }
  int64_t whole(const At& at, int64_t width) const {
    return (at.time * p.batch + at.row) * width + at.unit;
  }
  const NumbersOut& hidden_sums() const {
    return t.grad_hidden_sums.value ? t.grad_hidden_sums : t.grad_sums;
  }
  // What a product reads: gradients themselves, or a copy of this step's in terms.
  static constexpr bool kWide = sizeof(T) == sizeof(Acc);
  int64_t fed_row() const { return term_row<T, Term>(p.gates() * p.hidden); }
  Numbers fed(int64_t time) const {
    const NumbersOut& whole = t.norm.value ? t.grad_products : hidden_sums();
    return part<Term>(kWide ? whole : sums, (kWide ? time : time % 2) * p.batch * fed_row());
  }
  int64_t projected_row() const { return term_row<T, Term>(p.projection); }
  Numbers fed_projected(int64_t time) const {
    return part<Term>(kWide ? t.grad_projected : projected,
                      (kWide ? time : 0) * p.batch * projected_row());
  }
  // The copy of a vector of a row of gradients, as T holds it.
  template <class M>
  WEFT_INLINE void store_fed(const At& at, int64_t column, typename M::Number number) const {
    store_rounded<M, Term>(sums, (at.time % 2 * p.batch + at.row) * fed_row() + column, number,
                           at.count);
  }
  template <class M>
  WEFT_INLINE void store_sum(const At& at, int gate, typename M::Number of_x,
                             typename M::Number of_h) const {
    const int64_t row = (at.time * p.batch + at.row) * p.gates() + gate;
    const int64_t place = row * p.hidden + at.unit;
    of_x = rounded<T>(of_x), of_h = rounded<T>(of_h);
    store_rounded<M, T>(t.grad_sums, place, of_x, at.count);
    if (t.grad_hidden_sums.value) store_rounded<M, T>(t.grad_hidden_sums, place, of_h, at.count);
    if constexpr (!kWide) {
      if (t.norm.value) return;
      store_fed<M>(at, gate * p.hidden + at.unit, of_h);
    }
  }
  // c before the step.
  template <class M>
  WEFT_INLINE typename M::Number c_before(const At& at) const {
    if (at.fresh) return typename M::Number{};
    const int64_t before = at.time + (p.reverse ? 1 : -1);
    if (before < 0 || before >= p.steps) return load_number<M, T>(t.c0, cell(at), at.count);
    return load_number<M, T>(t.cells, (before * p.batch + at.row) * p.hidden + at.unit, at.count);
  }
  template <class M>
  WEFT_INLINE typename M::Number kept(const At& at, int count, int i) const {
    const int64_t row = (at.time * p.batch + at.row) * count + i;
    return load_number<M, T>(t.gates, row * p.hidden + at.unit, at.count);
  }
  // Adds what has come through a product with the state.
  template <class M>
  WEFT_INLINE void add_to_state(const At& at, typename M::Number grad) const {
    if (const void* dropout = t.masks.dropout)
      grad = load_units(static_cast<const T*>(dropout) + state(at), at.count) * grad;
    const auto before = load_number<M, Acc>(t.grad_h, state(at), at.count);
    store_number<M, Acc>(t.grad_h, state(at), before + grad, at.count);
  }
};

// The gradient of a new state before zoneout; `zoned` takes what passes on to the old one.
template <class M, class T, class Term>
WEFT_INLINE typename M::Number state_gradient(const BackwardOperands<T, Term>& o, const At& at,
                                              typename M::Number& zoned) {
  using N = typename M::Number;
  const N grad = load_number<M, accumulate_t<T>>(o.t.grad_h, o.state(at), at.count) +
                 load_number<M, T>(o.t.grad_output, o.whole(at, o.p.state()), at.count);
  if (o.p.zoneout == 0) return grad;
  const auto z = zone<T>(o.p, o.t.masks.zone_h, o.p.state(), at);
  zoned = z * grad;
  return (1 - z) * grad;
}

// Before the inner product with W_hr.
template <class M, class T, class Term>
__attribute__((noinline)) void project_back(const BackwardOperands<T, Term>& o, const At& at) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  N zoned = {};
  const N grad = state_gradient<M>(o, at, zoned);
  store_number<M, Acc>(o.t.grad_h, o.state(at), at.fresh ? N{} : zoned, at.count);
  store_number<M, T>(o.t.grad_projected, o.whole(at, o.p.projection), grad, at.count);
  if constexpr (!BackwardOperands<T, Term>::kWide)
    store_number<M, Term>(o.projected, at.row * o.projected_row() + at.unit, rounded<T>(grad),
                          at.count);
}

// After the inner product with U_n, whose gradient of r h is `grad`.
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void reset_back(const BackwardOperands<T, Term>& o, const At& at,
                                          typename M::Number grad) {
  using N = typename M::Number;
  N h = load_number<M, T>(o.t.h_before, o.whole(at, o.p.hidden), at.count);
  if (const void* dropout = o.t.masks.dropout)
    h = load_units(static_cast<const T*>(dropout) + o.state(at), at.count) * h;
  const auto r = Cell::template first_backward<M>(o.template kept<M>(at, Cell::kKept, 0), h, grad);
  o.template store_sum<M>(at, 0, r.x[0], r.x[0]);
  o.template add_to_state<M>(at, r.h);
}

// Gradients of the sums of one vector of units; leaves in grad_h what does not go through them.
// With a projection `grad` is the gradient of the unprojected state. Not inlined: it is called from
// many places, and long.
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void step_back(const BackwardOperands<T, Term>& o, const At& at,
                                         typename M::Number grad) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  const int64_t hidden = o.p.hidden;
  BackwardArguments<N> s;  // each cell reads its own
  N zoned_h = {}, zoned_c = {};
  s.grad_h = o.p.projection > 0 ? grad : state_gradient<M>(o, at, zoned_h);
#pragma GCC unroll 4
  for (int i = 0; i < Cell::kKept; ++i) s.kept[i] = o.template kept<M>(at, Cell::kKept, i);
  if constexpr (Cell::kHasCell) {
    s.c = o.template c_before<M>(at);
    s.grad_c = load_number<M, Acc>(o.t.grad_c, o.cell(at), at.count);
    s.next_c = load_number<M, T>(o.t.cells, o.whole(at, hidden), at.count);
    if (o.p.zoneout > 0) {
      const auto z = zone<T>(o.p, o.t.masks.zone_c, hidden, at);
      zoned_c = z * s.grad_c;
      s.grad_c = (1 - z) * s.grad_c;
      s.next_c = Cell::template cell_after<M>(s.kept, s.c);
    }
  }
  if constexpr (Cell::kTwoSums || Cell::kResetBefore)
    s.h = load_number<M, T>(o.t.h_before, o.whole(at, hidden), at.count);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(o.t.peephole, i * hidden + at.unit, at.count);
  }
  const BackwardResults<N> r = Cell::template backward<M>(s);
#pragma GCC unroll 4
  for (int g = 0; g < Cell::kGates; ++g)
    o.template store_sum<M>(at, g, r.x[g], Cell::kTwoSums ? r.q[g] : r.x[g]);
  if (o.p.projection == 0)
    store_number<M, Acc>(o.t.grad_h, o.state(at), at.fresh ? N{} : r.h + zoned_h, at.count);
  if constexpr (Cell::kHasCell) {
    store_number<M, Acc>(o.t.grad_c, o.cell(at), at.fresh ? N{} : r.c + zoned_c, at.count);
    if (o.t.unprojected.value)
      store_number<M, T>(o.t.unprojected, o.whole(at, hidden),
                         s.kept[Cell::kOutputGate] * M::tanh(s.next_c), at.count);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) {
      const int64_t place = (at.row * 3 + i) * hidden + at.unit;
      const N before = load_number<M, Acc>(o.t.grad_peephole, place, at.count);
      store_number<M, Acc>(o.t.grad_peephole, place, before + r.peephole[i], at.count);
    }
  }
}

// The blocks [first, end) of one row's gradients of sums, complete: of the products themselves,
// the state's and the input's.
template <class M, class T, class Term>
__attribute__((noinline)) void normalise_back(const BackwardOperands<T, Term>& o, int64_t time,
                                              int64_t row, int64_t first, int64_t end) {
  using Acc = accumulate_t<T>;
  const int64_t size = o.p.hidden, width = o.p.gates() * size;
  const int64_t column = first * size, at = (time * o.p.batch + row) * width + column;
  normalise_blocks_back<M, T>(part<T>(o.hidden_sums(), at), part<T>(o.t.products, at),
                              part<T>(o.t.norm, column), size, end - first,
                              shifted<T>(o.t.grad_products, at),
                              shifted<Acc>(o.t.grad_norm, row * width + column));
  normalise_blocks_back<M, T>(part<T>(o.t.grad_sums, at), part<T>(o.t.input_products, at),
                              part<T>(o.t.input_norm, column), size, end - first,
                              shifted<T>(o.t.grad_input_products, at),
                              shifted<Acc>(o.t.grad_input_norm, row * width + column));
  if constexpr (!BackwardOperands<T, Term>::kWide) {
    each_vector<T>(time, row, false, column, end * size, [&](const At& to) {
      const int64_t from = at + to.unit - column;
      o.template store_fed<M>(to, to.unit, load_number<M, T>(o.t.grad_products, from, to.count));
    });
  }
}

// A row without this step has no gradients of sums.
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void skip_back(const BackwardOperands<T, Term>& o, const At& at) {
  const typename M::Number zero = {};
  for (int g = 0; g < Cell::kGates; ++g) o.template store_sum<M>(at, g, zero, zero);
  if (o.t.unprojected.value)
    store_number<M, T>(o.t.unprojected, o.whole(at, o.p.hidden), zero, at.count);
}

template <int kPanelVectors, class T, class Term, bool kDual>
void layer_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using P = Panels<T, Term, kPanelVectors, 1>;
  const int64_t hidden = p.hidden, size = p.state(), sums = p.gates() * hidden;
  const bool projects = p.projection > 0, resets_before = p.has_inner() && !projects;
  // The product with U_n, the last third of W_hh, comes before that with the rest.
  const int64_t depth = resets_before ? 2 * hidden : sums;
  const WeightLayout layout = {size, depth, size, 0, 1};
  P w(layout, t.w_hh.value), w_derivative(layout, t.w_hh.derivative);
  const Numbers second =
      projects ? Numbers(t.w_hr) : (resets_before ? part<T>(t.w_hh, depth * hidden) : Numbers{});
  const WeightLayout inner_layout = {hidden, size, hidden, 0, 1};
  P v(inner_layout, second.value), v_derivative(inner_layout, second.derivative);
  constexpr bool kWide = BackwardOperands<T, Term>::kWide;
  Terms<T, Term> copies(kWide ? 0 : 2 * p.batch, sums, kDual);
  Terms<T, Term> projected(kWide || !projects ? 0 : p.batch, size, kDual);
  const BackwardOperands<T, Term> o = {p, t, copies.at(), projected.at()};

  const LayerSplit split = layer_split(p, context.threads);
  const int64_t most = split.by_rows || split.threads < w.count() ? split.threads : w.count();
  parallel_team(context, most, [&](const Team& all) {
    const Team team = split.by_rows ? Team{0, 1} : all;  // those that share rows
    Rows rows(split.by_rows ? all.begin(p.batch) : 0, split.by_rows ? all.end(p.batch) : p.batch);
    const Part own = Part::of(team, w), own_inner = Part::of(team, v);
    const Part& of_cell = projects ? own_inner : own;
    pack_part(all, w), pack_part(all, w_derivative);
    if (p.has_inner()) pack_part(all, v), pack_part(all, v_derivative);
    if (split.by_rows) all.barrier();
    rows.at_time(0, p.batch, {});
    for (int64_t s = p.steps - 1; s >= 0; --s) {
      const int64_t time = p.time(s);
      if (t.masks.lengths || t.masks.resets) rows.at_time(time, p.batch, t.masks);
      const auto fresh = [&](int64_t row) {
        return t.masks.resets && t.masks.resets[time * p.batch + row];
      };
      if (projects) {
        for (int64_t i = 0; i < rows.count; ++i)
          each_vector<T>(time, rows.order[i], i >= rows.fed, own.first_unit, own.last_unit,
                         [&](const At& at) {
                           if (i < rows.active) return project_back<M>(o, at);
                           store_number<M, T>(t.grad_projected, o.whole(at, size),
                                              typename M::Number{}, at.count);
                         });
        team.barrier();
      }
      dispatch_cell(p.cell, [&](auto cell) {
        using Cell = decltype(cell);
        if constexpr (Cell::kHasCell) {
          if (projects)
            multiply<M>(v, v_derivative, o.fed_projected(time), o.projected_row(),
                        rows.order.data(), rows.active, own_inner.begin, own_inner.end, kNotSoon,
                        each_row<M, Acc>(time, [&](At at, const auto& product) {
                          at.fresh = fresh(at.row);
                          step_back<Cell, M>(o, at, product);
                        }));
        }
        for (int64_t i = projects ? rows.active : 0; i < rows.count; ++i)
          each_vector<T>(time, rows.order[i], i >= rows.fed, of_cell.first_unit, of_cell.last_unit,
                         [&](const At& at) {
                           if (i < rows.active)
                             return step_back<Cell, M>(o, at, typename M::Number{});
                           skip_back<Cell, M>(o, at);
                         });
      });
      team.barrier();
      // A thread normalises whole rows.
      const auto normalise = [&](int64_t first, int64_t end) {
        if (t.norm.value == nullptr) return;
        for (int64_t i = team.begin(rows.active); i < team.end(rows.active); ++i)
          normalise_back<M>(o, time, rows.order[i], first, end);
        team.barrier();
      };
      normalise(resets_before ? 2 : 0, p.gates());
      if (resets_before) {
        const Numbers of_n = part<Term>(o.fed(time), depth);
        multiply<M>(v, v_derivative, of_n, o.fed_row(), rows.order.data(), rows.fed,
                    own_inner.begin, own_inner.end, kNotSoon,
                    each_row<M, Acc>(time, [&](const At& at, const auto& product) {
                      reset_back<GruResetBeforeLayer, M>(o, at, product);
                    }));
        team.barrier();
        normalise(0, 2);
      }
      multiply<M>(w, w_derivative, o.fed(time), o.fed_row(), rows.order.data(), rows.fed, own.begin,
                  own.end, kNotSoon,
                  each_row<M, Acc>(
                      time, [&](const At& at, const auto& product) __attribute__((always_inline)) {
                        o.template add_to_state<M>(at, product);
                      }));
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
