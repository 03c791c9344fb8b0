// Forward of a recurrent layer on CUDA; see rnn_layer.cu.
#include "rnn/rnn_layer_unit.h"

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

// Tensors are those of this step. `_d` are derivatives. Where an inner product follows, the state
// is left to layer_finish.
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
  const bool normalised = t.normal.value != nullptr;
  N sum[kSums] = {}, x[4] = {};
  if (!normalised)
    number_product<kGates, M, T>(tile, at, p.state(), t.h, t.masks.dropout, t.w_hh, sum);
  if (!at.inside) return;
  for (int g = 0; g < kGates; ++g) {
    const int64_t place = (at.row * Cell::kGates + g) * p.hidden + at.unit;
    if (normalised) sum[g] = load_number<M, Acc>(t.normal, place);
    x[g] = load_number<M, Acc>(t.sums, place);
  }
  const int64_t element = at.row * p.hidden + at.unit;
  UnitState<N> before = {};
  if (p.projection == 0) before.h = load_number<M, T>(t.h, element);
  if constexpr (Cell::kHasCell) before.c = load_number<M, T>(t.c, element);
  step_unit<Cell, M, T>(p, {t.time, t.masks, normalised}, at.row, at.unit,
                        load_weights<Cell, M, T>(p, at.unit, t.b_ih, t.b_hh, t.peephole), x, sum,
                        before,
                        {{h_next, h_next_d},
                         {c_next, c_next_d},
                         {output, output_d},
                         {cells, cells_d},
                         {gates, gates_d},
                         {inner, inner_d}});
}

// The inner product and what it finishes.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_finish(CellProblem tile, LayerProblem p, StepInputs t,
                                       Numbers inner, Numbers weights, T* h_next, T* h_next_d,
                                       T* output, T* output_d, T* gates, T* gates_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  const Place at = place_of_thread(tile);
  const bool normalised = Cell::kResetBefore && t.normal.value;
  N sum[kSums] = {}, x = {}, z = {};
  if (!normalised) number_product<1, M, T>(tile, at, p.hidden, inner, nullptr, weights, sum);
  if (!at.inside) return;
  UnitWeights<N> w = {};
  if constexpr (Cell::kResetBefore) {
    const int64_t place = (at.row * Cell::kGates + 2) * p.hidden + at.unit;
    if (normalised) sum[0] = load_number<M, Acc>(t.normal, place);
    x = load_number<M, Acc>(t.sums, place);
    z = load_number<M, T>(inner, p.units() + at.row * p.hidden + at.unit);
    w = load_weights<Cell, M, T>(p, at.unit, t.b_ih, t.b_hh, t.peephole);
  }
  finish_unit<Cell, M, T>(p, {t.time, t.masks, normalised}, at.row, at.unit, w, x, z, sum[0],
                          load_number<M, T>(t.h, at.row * p.state() + at.unit),
                          {{h_next, h_next_d}, {}, {output, output_d}, {}, {gates, gates_d}, {}});
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
  if (sequence_forward(p, t, context)) return;
  dispatch_cell(p.cell, [&](auto cell) {
    dispatch_numbers(p, [&](auto tag, auto dual) {
      forward<decltype(cell), typename decltype(tag)::type, decltype(dual)::value>(p, t, context);
    });
  });
}

}  // namespace weft::WEFT_TARGET
