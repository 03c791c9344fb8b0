// Forward of a recurrent layer on CPU, for numbers of either kind; see rnn_layer_cpu.cpp.
#pragma once

#include "rnn/rnn_layer_norm_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T, class Term>
struct ForwardOperands {
  const LayerProblem& p;
  const LayerForward& t;
  NumbersOut h[2];    // [B, S]: the state before and after a step, in turn
  NumbersOut fed[2];  // terms: the same as the product sees it; may be `h`
  NumbersOut c;       // [B, H]
  NumbersOut inner;   // terms [B, H]: what an inner product sees
  NumbersOut update;  // [B, H]: z of a GRU that resets before
  NumbersOut sums;    // [B, gates * H]: the state's products, if they are normalised, by slots
  int next;           // which of the two the step in hand writes

  int64_t cell(const At& at) const { return at.row * p.hidden + at.unit; }
  int64_t state(const At& at) const { return at.row * p.state() + at.unit; }
  int64_t fed_state(const At& at) const { return at.row * term_row<T, Term>(p.state()) + at.unit; }
  int64_t inner_cell(const At& at) const { return at.row * term_row<T, Term>(p.hidden) + at.unit; }
  int64_t whole(const At& at, int64_t width) const {
    return (at.time * p.batch + at.row) * width + at.unit;
  }
  // The sums of the row that is the slot-th to take the step.
  int64_t sum(int64_t slot, int64_t unit, int gate) const {
    return (slot * p.gates() + gate) * p.hidden + unit;
  }
};

template <class M, class T, class Term>
WEFT_INLINE void store_state(const ForwardOperands<T, Term>& o, const At& at,
                             typename M::Number h) {
  using Acc = accumulate_t<T>;
  store_number<M, Acc>(o.h[o.next], o.state(at), h, at.count);
  if (o.fed[0].value == o.h[0].value) return;
  if (const void* dropout = o.t.masks.dropout)
    h = rounded<Term>(load_units(static_cast<const T*>(dropout) + o.state(at), at.count) * h);
  store_rounded<M, Term>(o.fed[o.next], o.fed_state(at), h, at.count);
}

// The state before the step.
template <class M, class T, class Term>
WEFT_INLINE typename M::Number old_state(const ForwardOperands<T, Term>& o, const At& at) {
  if (at.fresh) return typename M::Number{};
  return load_number<M, accumulate_t<T>>(o.h[1 - o.next], o.state(at), at.count);
}

// The same as the product sees it.
template <class M, class T, class Term>
WEFT_INLINE typename M::Number fed_state(const ForwardOperands<T, Term>& o, const At& at) {
  if (at.fresh) return typename M::Number{};
  return load_number<M, Term>(o.fed[1 - o.next], o.fed_state(at), at.count);
}

// The new state of one vector of units, before zoneout.
template <class M, class T, class Term>
WEFT_INLINE void finish_state(const ForwardOperands<T, Term>& o, const At& at,
                              typename M::Number h) {
  if (o.p.zoneout > 0) {
    const auto z = zone<T>(o.p, o.t.masks.zone_h, o.p.state(), at);
    h = z * old_state<M>(o, at) + (1 - z) * h;
  }
  h = rounded<T>(h);
  store_state<M>(o, at, h);
  store_rounded<M, T>(o.t.output, o.whole(at, o.p.state()), h, at.count);
}

// W_ih x of a gate.
template <class M, class T, class Term>
WEFT_INLINE typename M::Number input_sum(const ForwardOperands<T, Term>& o, const At& at,
                                         int gate) {
  return load_number<M, accumulate_t<T>>(o.t.sums, o.whole(at, o.t.sums_row) + gate * o.p.hidden,
                                         at.count);
}

template <class Cell, class M, class T, class Term>
WEFT_INLINE void store_kept(const ForwardOperands<T, Term>& o, const At& at, int gate,
                            typename M::Number kept) {
  if (o.t.gates.value == nullptr) return;
  const int64_t row = (at.time * o.p.batch + at.row) * Cell::kKept + gate;
  store_number<M, T>(o.t.gates, row * o.p.hidden + at.unit, kept, at.count);
}

// Some rows at one vector of units; `sums` are the hidden state's products. What an inner product
// is to finish is left to it. Not inlined: it is called from several places, and long; biases and
// constants are loaded once for all rows.
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void take_step(const ForwardOperands<T, Term>& o, const int64_t* rows,
                                         int64_t row_count, const At& where,
                                         const RowSums<accumulate_t<T>>& sums) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  constexpr int kGates = Cell::kResetBefore ? 2 : Cell::kGates;
  const int64_t hidden = o.p.hidden;
  const int count = where.count;
  StepArguments<N> s;
  N b_ih[4], b_hh[4];
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) {
    b_ih[g] = load_number<M, T>(o.t.b_ih, g * hidden + where.unit, count);
    b_hh[g] = load_number<M, T>(o.t.b_hh, g * hidden + where.unit, count);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(o.t.peephole, i * hidden + where.unit, count);
  }
  const auto pass_on = [&](const At& at, N h) __attribute__((always_inline)) {
    if (o.p.has_inner()) {
      store_rounded<M, Term>(o.inner, o.inner_cell(at), rounded<T>(h), count);
    } else {
      finish_state<M>(o, at, h);
    }
  };
  // h waits for the cells of some rows: a row's gates are one long chain of operations, of which
  // the processor overlaps the more the shorter they are.
  constexpr int64_t kChain = Cell::kHasCell ? 8 : 1;
  for (int64_t first = 0; first < row_count; first += kChain) {
    const int64_t end = first + kChain < row_count ? first + kChain : row_count;
    N output_gate[kChain], cell[kChain];
    for (int64_t i = first; i < end; ++i) {
      At at = where;
      at.row = rows[i];
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        s.x[g] = input_sum<M>(o, at, g) + b_ih[g];
        s.q[g] = b_hh[g] + sums.template get<M>(i, g, count);
      }
      StepResults<N> r;
      if constexpr (Cell::kHasCell) {
        s.c = at.fresh ? N{} : load_number<M, Acc>(o.c, o.cell(at), count);
        r = Cell::template until_cell<M>(s);
        output_gate[i - first] = r.kept[Cell::kOutputGate], cell[i - first] = r.c;
        if (o.p.zoneout > 0) {
          const auto z = zone<T>(o.p, o.t.masks.zone_c, hidden, at);
          r.c = z * s.c + (1 - z) * r.c;
        }
        const N c = rounded<T>(r.c);
        store_number<M, Acc>(o.c, o.cell(at), c, count);
        if (o.t.cells.value) store_rounded<M, T>(o.t.cells, o.whole(at, hidden), c, count);
      } else {
        if constexpr (Cell::kResetBefore) {
          s.h = fed_state<M>(o, at);
        } else if constexpr (Cell::kTwoSums) {
          s.h = old_state<M>(o, at);
        }
        r = Cell::template forward<M>(s);
      }
      for (int k = 0; k < (Cell::kResetBefore ? 2 : Cell::kKept); ++k)
        store_kept<Cell, M>(o, at, k, r.kept[k]);
      if constexpr (Cell::kResetBefore)
        store_number<M, Acc>(o.update, o.cell(at), r.kept[1], count);
      if constexpr (!Cell::kHasCell) pass_on(at, r.h);
    }
    if constexpr (Cell::kHasCell) {
      for (int64_t i = first; i < end; ++i) {
        At at = where;
        at.row = rows[i];
        pass_on(at, output_gate[i - first] * M::tanh(cell[i - first]));
      }
    }
  }
}

// The rest of a step after its inner product.
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void finish_step(const ForwardOperands<T, Term>& o, const At& at,
                                           typename M::Number sum) {
  using Acc = accumulate_t<T>;
  using N = typename M::Number;
  if constexpr (Cell::kResetBefore) {
    const N q = sum + load_number<M, T>(o.t.b_hh, 2 * o.p.hidden + at.unit, at.count);
    const N x =
        input_sum<M>(o, at, 2) + load_number<M, T>(o.t.b_ih, 2 * o.p.hidden + at.unit, at.count);
    const N n = M::tanh(x + q);
    const N z = load_number<M, Acc>(o.update, o.cell(at), at.count);
    store_kept<Cell, M>(o, at, 2, n);
    sum = gru_next_hidden(z, n, old_state<M>(o, at));
  }
  finish_state<M>(o, at, sum);
}

// A row without this step: zero output, the state as it was.
template <class M, class T, class Term>
__attribute__((noinline)) void skip_state(const ForwardOperands<T, Term>& o, const At& at) {
  store_state<M>(o, at, old_state<M>(o, at));
  store_number<M, T>(o.t.output, o.whole(at, o.p.state()), typename M::Number{}, at.count);
}
template <class Cell, class M, class T, class Term>
__attribute__((noinline)) void skip_cell(const ForwardOperands<T, Term>& o, const At& at) {
  if (o.t.cells.value)
    store_number<M, T>(o.t.cells, o.whole(at, o.p.hidden),
                       load_number<M, accumulate_t<T>>(o.c, o.cell(at), at.count), at.count);
  for (int i = 0; i < Cell::kKept; ++i) store_kept<Cell, M>(o, at, i, typename M::Number{});
}

// The blocks [first, end) of one row's products, complete, the input's and the state's; a fresh row
// has none of the state.
template <class M, class T, class Term>
__attribute__((noinline)) void normalise_products(const ForwardOperands<T, Term>& o, int64_t time,
                                                  int64_t row, int64_t slot, bool fresh, int first,
                                                  int end) {
  using Acc = accumulate_t<T>;
  const NumbersOut sums = shifted<Acc>(o.sums, o.sum(slot, 0, first));
  const int64_t size = o.p.hidden, blocks = end - first;
  if (fresh)
    each_part<T>(blocks * size, [&](int64_t at, int count) {
      store_number<M, Acc>(sums, at, typename M::Number{}, count);
    });
  const int64_t line = time * o.p.batch + row, column = first * size;
  const int64_t whole = line * o.p.gates() * size + column;
  normalise_blocks<M, T>(sums, part<T>(o.t.norm, column), size, blocks, sums,
                         shifted<T>(o.t.products, whole));
  normalise_blocks<M, T>(part<Acc>(o.t.input_products, whole), part<T>(o.t.input_norm, column),
                         size, blocks, shifted<Acc>(o.t.sums, line * o.t.sums_row + column),
                         shifted<T>(o.t.kept_products, whole));
}

// The same of a thread's share of the rows, all steps of which then `take(slot, count, fresh)`;
// some rows at a time, while their sums are in the cache.
template <class M, class T, class Term, class Take>
WEFT_INLINE void normalise_and_take(const ForwardOperands<T, Term>& o, const Rows& rows,
                                    const Team& team, int64_t time, int first, int end,
                                    const Take& take) {
  const int64_t last = team.end(rows.active);
  for (int64_t i = team.begin(rows.active); i < last;) {
    const bool fresh = i >= rows.fed;
    const int64_t most = fresh ? last : rows.fed < last ? rows.fed : last, begin = i;
    for (; i < most && i < begin + kRowBlock; ++i)
      normalise_products<M>(o, time, rows.order[i], rows.first + i, fresh, first, end);
    take(begin, i - begin, fresh);
  }
}

template <class Cell, class T, class Term, bool kDual>
void layer_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  constexpr int kGates = Cell::kResetBefore ? 2 : Cell::kGates;
  using P = Panels<T, Term, kGates <= 2 ? 4 : kGates, kGates>;
  using Inner = Panels<T, Term, 4, 1>;
  const int64_t hidden = p.hidden, size = p.state(), units = p.units(), states = p.states();
  const bool two = p.has_inner(), separate = kPairs<T, Term> || t.masks.dropout != nullptr;
  const bool normalised = t.norm.value != nullptr;
  const WeightLayout layout = {hidden, size, 1, hidden * size, size};
  P w(layout, t.w_hh.value), w_derivative(layout, t.w_hh.derivative);
  // U_n is the last third of W_hh.
  const Numbers second =
      Cell::kResetBefore ? part<T>(t.w_hh, 2 * hidden * hidden) : Numbers(t.w_hr);
  const WeightLayout inner_layout = {size, hidden, 1, 0, hidden};
  Inner v(inner_layout, second.value), v_derivative(inner_layout, second.derivative);
  Work<Acc> state(2 * states, kDual), cell(Cell::kHasCell ? units : 0, kDual);
  Terms<T, Term> fed(separate ? 2 * p.batch : 0, size, kDual);
  Terms<T, Term> inner(two ? p.batch : 0, hidden, kDual);
  Work<Acc> update(Cell::kResetBefore ? units : 0, kDual);
  Work<Acc> sums(normalised ? Cell::kGates * units : 0, kDual);
  const int64_t fed_row = term_row<T, Term>(size), inner_row = term_row<T, Term>(hidden);
  copy_numbers<T, Acc>(t.h0, states, state.at());
  if constexpr (Cell::kHasCell) copy_numbers<T, Acc>(t.c0, units, cell.at());

  const LayerSplit split = layer_split(p, context.threads);
  const int64_t most = split.by_rows || split.threads < w.count() ? split.threads : w.count();
  parallel_team(context, most, [&](const Team& all) {
    const Team team = split.by_rows ? Team{0, 1} : all;  // those that share rows
    ForwardOperands<T, Term> o = {p,
                                  t,
                                  {state.at(), state.at(states)},
                                  {state.at(), state.at(states)},
                                  cell.at(),
                                  inner.at(),
                                  update.at(),
                                  sums.at(),
                                  0};
    if (separate) o.fed[0] = fed.at(), o.fed[1] = fed.at(p.batch * fed_row);
    Rows rows(split.by_rows ? all.begin(p.batch) : 0, split.by_rows ? all.end(p.batch) : p.batch);
    const Part own = Part::of(team, w), own_inner = Part::of(team, v);
    const Part& of_state = two ? own_inner : own;
    pack_part(all, w), pack_part(all, w_derivative);
    if (two) pack_part(all, v), pack_part(all, v_derivative);
    if (split.by_rows) all.barrier();
    if (separate) {
      o.next = 0;
      for (int64_t row = rows.first; row < rows.first + rows.count; ++row)
        each_vector<T>(0, row, false, of_state.first_unit, of_state.last_unit, [&](const At& at) {
          store_state<M>(o, at, load_number<M, Acc>(o.h[0], o.state(at), at.count));
        });
      team.barrier();
    }
    rows.at_time(0, p.batch, {});
    for (int64_t s = 0; s < p.steps; ++s) {
      const int64_t time = p.time(s);
      o.next = static_cast<int>(1 - s % 2);
      if (t.masks.lengths || t.masks.resets) rows.at_time(time, p.batch, t.masks);
      multiply<M>(
          w, w_derivative, o.fed[1 - o.next], fed_row, rows.order.data(), rows.fed, own.begin,
          own.end,
          [&](int64_t row, int64_t unit) __attribute__((always_inline)) {
            const Numbers& read = normalised ? t.input_products : Numbers(t.sums);
            const int64_t line = normalised ? p.gates() * hidden : t.sums_row;
            const auto* from = static_cast<const Acc*>(read.value);
            for (int g = 0; g < Cell::kGates; ++g) {  // which may begin anywhere in a line
              const auto* sum = from + o.whole(At{time, row, unit, 0}, line) + g * hidden;
              __builtin_prefetch(sum), __builtin_prefetch(sum + P::kLane - 1);
            }
          },
          [&](const int64_t* some, int64_t row_count, int64_t unit, int count,
              const RowSums<Acc>& found) __attribute__((always_inline)) {
            if (!normalised)
              return take_step<Cell, M>(o, some, row_count, At{time, 0, unit, count}, found);
            const int64_t slot = rows.slot(some);
            for (int64_t i = 0; i < row_count; ++i)
              for (int g = 0; g < kGates; ++g)
                store_number<M, Acc>(o.sums, o.sum(slot + i, unit, g),
                                     found.template get<M>(i, g, count), count);
          });
      if (normalised) {  // whole rows are needed: a thread takes some of them
        team.barrier();
        normalise_and_take<M>(
            o, rows, team, time, 0, kGates, [&](int64_t first, int64_t row_count, bool fresh) {
              each_vector<T>(time, 0, fresh, 0, hidden, [&](const At& at) {
                const Numbers found = part<Acc>(o.sums, o.sum(rows.first + first, at.unit, 0));
                take_step<Cell, M>(o, rows.order.data() + first, row_count, at,
                                   {found, Cell::kGates * hidden, hidden});
              });
            });
      } else if (rows.fed < rows.active) {
        each_vector<T>(time, 0, true, own.first_unit, own.last_unit, [&](const At& at) {
          take_step<Cell, M>(o, rows.order.data() + rows.fed, rows.active - rows.fed, at, {});
        });
      }
      if (two) {
        team.barrier();
        multiply<M>(v, v_derivative, o.inner, inner_row, rows.order.data(), rows.active,
                    own_inner.begin, own_inner.end, kNotSoon,
                    [&](const int64_t* some, int64_t row_count, int64_t unit, int count,
                        const RowSums<Acc>& found) __attribute__((always_inline)) {
                      for (int64_t i = 0; i < row_count; ++i) {
                        At at = {time, some[i], unit, count};
                        at.fresh = t.masks.resets && t.masks.resets[time * p.batch + at.row];
                        const auto sum = found.template get<M>(i, 0, count);
                        if (!Cell::kResetBefore || !normalised) {
                          finish_step<Cell, M>(o, at, sum);
                        } else {
                          store_number<M, Acc>(o.sums, o.sum(rows.slot(some) + i, unit, 2), sum,
                                               count);
                        }
                      }
                    });
        if (Cell::kResetBefore && normalised) {
          team.barrier();
          normalise_and_take<M>(
              o, rows, team, time, 2, 3, [&](int64_t first, int64_t row_count, bool fresh) {
                for (int64_t i = first; i < first + row_count; ++i)
                  each_vector<T>(time, rows.order[i], fresh, 0, hidden, [&](const At& at) {
                    const int64_t place = o.sum(rows.first + i, at.unit, 2);
                    finish_step<Cell, M>(o, at, load_number<M, Acc>(o.sums, place, at.count));
                  });
              });
        }
      }
      for (int64_t i = rows.active; i < rows.count; ++i) {
        each_vector<T>(time, rows.order[i], false, own.first_unit, own.last_unit,
                       [&](const At& at) { skip_cell<Cell, M>(o, at); });
        each_vector<T>(time, rows.order[i], false, of_state.first_unit, of_state.last_unit,
                       [&](const At& at) { skip_state<M>(o, at); });
      }
      team.barrier();
    }
  });
  copy_numbers<Acc, T>(state.at(p.steps % 2 * states), states, t.h_n);
  if constexpr (Cell::kHasCell) copy_numbers<Acc, T>(cell.at(), units, t.c_n);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
