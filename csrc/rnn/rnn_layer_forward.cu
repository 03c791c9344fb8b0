// Forward of a recurrent layer on CUDA; see rnn_layer.cu.
#include "rnn/rnn_layer_tile.h"

namespace weft::WEFT_TARGET {
namespace {

struct StepInputs {
  int64_t time;
  Numbers normal;  // wide [B, gates * H]: products, normalised; or null: to be made
  Numbers sums, h, c, w_hh, b_ih, b_hh, peephole;
  LayerMasks masks;
};

// kGates blocks of one step's product, to be normalised; `out` begins at the first of them.
template <int kGates, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_product(CellProblem tile, int64_t k, int64_t out_row, Numbers h,
                                        const void* dropout, Numbers w, accumulate_t<T>* out,
                                        accumulate_t<T>* out_d) {
  using M = LayerMath<T, kDual>;
  const Place at = place_of_thread(tile);
  typename M::Number sum[kSums] = {};
  number_product<kGates, M, T>(tile, at, k, h, dropout, w, sum);
  if (!at.inside) return;
  for (int g = 0; g < kGates; ++g)
    store_number<M>(out, out_d, at.row * out_row + g * tile.hidden + at.unit, sum[g]);
}

// The state that a step leaves, zoneout applied; `old` is 0 for a fresh row.
template <class M, class T>
WEFT_DEVICE void finish_state(const LayerProblem& p, const LayerMasks& masks, int64_t element,
                              typename M::Number old, typename M::Number h, T* h_next, T* h_next_d,
                              T* output, T* output_d) {
  using Acc = accumulate_t<T>;
  if (p.zoneout > 0) {
    const Acc z = zone<T>(p, masks.zone_h, element);
    h = z * old + (Acc{1} - z) * h;
  }
  store_number<M>(h_next, h_next_d, element, h);
  store_number<M>(output, output_d, element, h);
}

// Tensors are those of this step. `_d` are derivatives. Where an inner product follows, its factor
// goes to `inner` [2, B, H], with z of a GRU that resets before as the second, and the state is
// left to layer_finish.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_step(CellProblem tile, LayerProblem p, StepInputs t, T* h_next,
                                     T* h_next_d, T* c_next, T* c_next_d, T* output, T* output_d,
                                     T* cells, T* cells_d, T* gates, T* gates_d, T* inner,
                                     T* inner_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  constexpr int kGates = Cell::kResetBefore ? 2 : Cell::kGates;
  const Place at = place_of_thread(tile);
  N sum[kSums] = {};
  if (!t.normal.value)
    number_product<kGates, M, T>(tile, at, p.state(), t.h, t.masks.dropout, t.w_hh, sum);
  if (!at.inside) return;
  if (t.normal.value) {
    for (int g = 0; g < kGates; ++g)
      sum[g] = load_number<M, Acc>(t.normal, (at.row * Cell::kGates + g) * p.hidden + at.unit);
  }

  const int64_t element = at.row * p.hidden + at.unit;
  const auto keep = [&](int i, N kept) {
    if (gates)
      store_number<M>(gates, gates_d, (at.row * Cell::kKept + i) * p.hidden + at.unit, kept);
  };
  if (t.masks.lengths && t.time >= load(t.masks.lengths + at.row)) {
    if constexpr (Cell::kHasCell) {
      const N c = load_number<M, T>(t.c, element);
      store_number<M>(c_next, c_next_d, element, c);
      if (cells) store_number<M>(cells, cells_d, element, c);
    }
    for (int i = 0; i < Cell::kKept; ++i) keep(i, N{});
    if (p.has_inner()) {
      store_number<M>(inner, inner_d, element, N{});
      if (Cell::kResetBefore) store_number<M>(inner, inner_d, p.units() + element, N{});
    } else {
      store_number<M>(h_next, h_next_d, element, load_number<M, T>(t.h, element));
      store_number<M>(output, output_d, element, N{});
    }
    return;
  }
  const bool fresh = t.masks.resets && load(t.masks.resets + at.row);
  StepArguments<N> s = {};
  for (int g = 0; g < kGates; ++g) {
    const int64_t column = g * p.hidden + at.unit;
    s.x[g] = load_number<M, Acc>(t.sums, at.row * Cell::kGates * p.hidden + column) +
             load_number<M, T>(t.b_ih, column);
    s.q[g] = load_number<M, T>(t.b_hh, column);
    if (!fresh || t.normal.value) s.q[g] = s.q[g] + sum[g];
  }
  if (!fresh && p.projection == 0) s.h = load_number<M, T>(t.h, element);
  const N old = s.h;
  if constexpr (Cell::kResetBefore) {
    if (t.masks.dropout) s.h = load_or_zero<T>(t.masks.dropout, element) * s.h;
  }
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = load_number<M, T>(t.c, element);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(t.peephole, i * p.hidden + at.unit);
  }
  StepResults<N> r = Cell::template forward<M>(s);
  if constexpr (Cell::kHasCell) {
    if (p.zoneout > 0) {
      const Acc z = zone<T>(p, t.masks.zone_c, element);
      r.c = z * s.c + (Acc{1} - z) * r.c;
    }
    store_number<M>(c_next, c_next_d, element, r.c);
    if (cells) store_number<M>(cells, cells_d, element, r.c);
  }
  for (int i = 0; i < (Cell::kResetBefore ? 2 : Cell::kKept); ++i) keep(i, r.kept[i]);
  if (p.has_inner()) {
    store_number<M>(inner, inner_d, element, r.h);
    if (Cell::kResetBefore) store_number<M>(inner, inner_d, p.units() + element, r.kept[1]);
  } else {
    finish_state<M>(p, t.masks, element, old, r.h, h_next, h_next_d, output, output_d);
  }
}

// The inner product and what it finishes: h = W_hr m, or the candidate of a GRU and its state.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_finish(CellProblem tile, LayerProblem p, StepInputs t,
                                       Numbers inner, Numbers weights, T* h_next, T* h_next_d,
                                       T* output, T* output_d, T* gates, T* gates_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  const Place at = place_of_thread(tile);
  N sum[kSums] = {};
  const bool normalised = Cell::kResetBefore && t.normal.value;
  if (!normalised) number_product<1, M, T>(tile, at, p.hidden, inner, nullptr, weights, sum);
  if (!at.inside) return;
  if (normalised)
    sum[0] = load_number<M, Acc>(t.normal, (at.row * Cell::kGates + 2) * p.hidden + at.unit);

  const int64_t element = at.row * p.state() + at.unit;
  const N before = load_number<M, T>(t.h, element);
  [[maybe_unused]] const int64_t kept = (at.row * Cell::kKept + 2) * p.hidden + at.unit;
  if (t.masks.lengths && t.time >= load(t.masks.lengths + at.row)) {
    store_number<M>(h_next, h_next_d, element, before);
    store_number<M>(output, output_d, element, N{});
    if (Cell::kResetBefore && gates) store_number<M>(gates, gates_d, kept, N{});
    return;
  }
  const N old = t.masks.resets && load(t.masks.resets + at.row) ? N{} : before;
  N h = sum[0];
  if constexpr (Cell::kResetBefore) {
    const int64_t column = 2 * p.hidden + at.unit;
    const N x = load_number<M, Acc>(t.sums, at.row * Cell::kGates * p.hidden + column) +
                load_number<M, T>(t.b_ih, column);
    const N n = M::tanh(x + (h + load_number<M, T>(t.b_hh, column)));
    const N z = load_number<M, T>(inner, p.units() + element);
    if (gates) store_number<M>(gates, gates_d, kept, n);
    h = gru_next_hidden(z, n, old);
  }
  finish_state<M>(p, t.masks, element, old, h, h_next, h_next_d, output, output_d);
}

template <class Cell, class T, bool kDual>
void forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  const CellProblem cell = tiles(p, p.hidden), state = tiles(p, p.state());
  const int64_t units = p.units(), states = p.states();
  Numbers h = t.h0, c = t.c0;
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t time = p.time(s);
    const bool last = s == p.steps - 1;
    const auto next = [&](void* final, void* buffers, int64_t count) {
      return last ? static_cast<T*>(final) : shifted<T>(buffers, s % 2 * count);
    };
    T *h_next = next(t.h_n.value, t.states.value, states),
      *h_next_d = next(t.h_n.derivative, t.states.derivative, states),
      *c_next = next(t.c_n.value, t.cell_states.value, units),
      *c_next_d = next(t.c_n.derivative, t.cell_states.derivative, units),
      *output = shifted<T>(t.output.value, time * states),
      *output_d = shifted<T>(t.output.derivative, time * states),
      *gates = shifted<T>(t.gates.value, Cell::kKept * time * units),
      *gates_d = shifted<T>(t.gates.derivative, Cell::kKept * time * units),
      *inner = static_cast<T*>(t.inner.value), *inner_d = static_cast<T*>(t.inner.derivative);
    const bool normalised = t.norm.value != nullptr;
    const LayerMasks masks = masks_at<T>(p, t.masks, time);
    // The blocks from `first` on, complete and normalised.
    const auto normalise = [&](auto gates, int64_t first, int64_t k, const Numbers& from,
                               const void* dropout) {
      constexpr int kGates = decltype(gates)::value;
      const int64_t column = first * p.hidden, columns = p.gates() * p.hidden;
      const NumbersOut step = part<Acc>(t.step, column);
      device::launch({"recurrent_layer_product", tile_blocks(cell), kCellThreads,
                      product_bytes<T>(kGates), context.stream},
                     layer_product<kGates, T, kDual>, cell, k, columns, from, dropout,
                     part<T>(t.w_hh, column * k), static_cast<Acc*>(step.value),
                     static_cast<Acc*>(step.derivative));
      NormForward n;
      n.rows = p.batch, n.first = first, n.end = first + kGates;
      n.products = t.step, n.scale = t.norm, n.fresh = masks.resets;
      n.kept = part<T>(t.products, time * p.batch * columns);
      n.out = t.step, n.out_row = columns;
      normalise_rows(p, n, context);
    };
    constexpr int kProducts = Cell::kResetBefore ? 2 : Cell::kGates;
    if (normalised)
      normalise(std::integral_constant<int, kProducts>{}, 0, p.state(), h, masks.dropout);
    const StepInputs inputs = {time,
                               normalised ? Numbers(t.step) : Numbers{},
                               part<Acc>(t.sums, time * p.batch * t.sums_row),
                               h,
                               c,
                               t.w_hh,
                               t.b_ih,
                               t.b_hh,
                               t.peephole,
                               masks};
    const bool two = p.has_inner();
    device::launch({"recurrent_layer_step", tile_blocks(cell), kCellThreads,
                    product_bytes<T>(kProducts), context.stream},
                   layer_step<Cell, T, kDual>, cell, p, inputs, two ? nullptr : h_next,
                   two ? nullptr : h_next_d, c_next, c_next_d, two ? nullptr : output,
                   two ? nullptr : output_d, shifted<T>(t.cells.value, time * units),
                   shifted<T>(t.cells.derivative, time * units), gates, gates_d, inner, inner_d);
    if (two) {
      const Numbers weights =
          Cell::kResetBefore ? part<T>(t.w_hh, 2 * p.hidden * p.hidden) : t.w_hr;
      if (Cell::kResetBefore && normalised)
        normalise(std::integral_constant<int, 1>{}, 2, p.hidden, t.inner, nullptr);
      device::launch({"recurrent_layer_finish", tile_blocks(state), kCellThreads,
                      product_bytes<T>(1), context.stream},
                     layer_finish<Cell, T, kDual>, state, p, inputs, Numbers(t.inner), weights,
                     h_next, h_next_d, output, output_d, gates, gates_d);
    }
    h = {h_next, h_next_d};
    c = {c_next, c_next_d};
  }
}

}  // namespace

void layer_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  dispatch_cell(p.cell, [&](auto cell) {
    dispatch_numbers(p, [&](auto tag, auto dual) {
      forward<decltype(cell), typename decltype(tag)::type, decltype(dual)::value>(p, t, context);
    });
  });
}

}  // namespace weft::WEFT_TARGET
