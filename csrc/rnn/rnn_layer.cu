// Whole sequences of a recurrent layer on CUDA: a fused kernel a step.
//
// Forward: the hidden state's product as in rnn.cu, with the gates as its epilogue; the state
// passes from step to step through two buffers in memory. Backward: an elementwise kernel for the
// gates' gradients, one thread per row and unit, and a tile product with W_hh for the gradient one
// step before. Bound: launches and the bytes of W_hh, which every step reads again. On dual numbers
// a step has three products, one after another through the same tiles.
#include <cmath>
#include <type_traits>

#include "core/window.h"
#include "device/device.h"
#include "rnn/cell_tile.h"
#include "rnn/rnn_layer.h"
#include "rnn/rnn_layer_cells.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kElementThreads = 256;

// ---- numbers -----------------------------------------------------------------------------------

template <class V>
struct ScalarMath {
  using Number = V;
  static constexpr bool kDual = false;
  static WEFT_DEVICE V one() { return V{1}; }
  static WEFT_DEVICE V sigmoid(V x) { return V{1} / (V{1} + std::exp(-x)); }
  static WEFT_DEVICE V tanh(V x) { return std::tanh(x); }
  static WEFT_DEVICE V relu(V x) { return x < V{0} ? V{0} : x; }  // NaN stays NaN
  static WEFT_DEVICE V where_positive(V y, V x) { return y <= V{0} ? V{0} : x; }
};

template <class T, bool kDual>
using LayerMath =
    std::conditional_t<kDual, DualMath<ScalarMath<accumulate_t<T>>>, ScalarMath<accumulate_t<T>>>;

// Zero where there is no tensor.
template <class T>
WEFT_DEVICE accumulate_t<T> load_or_zero(const void* address, int64_t offset) {
  return address ? widen(load(static_cast<const T*>(address) + offset)) : accumulate_t<T>{0};
}
template <class M, class T>
WEFT_DEVICE typename M::Number load_number(const Numbers& t, int64_t offset) {
  if constexpr (M::kDual) {
    return {load_or_zero<T>(t.value, offset), load_or_zero<T>(t.derivative, offset)};
  } else {
    return load_or_zero<T>(t.value, offset);
  }
}
template <class M, class T>
WEFT_DEVICE void store_number(T* value, T* derivative, int64_t offset, typename M::Number number) {
  if constexpr (M::kDual) {
    store(value + offset, narrow<T>(number.value));
    store(derivative + offset, narrow<T>(number.derivative));
  } else {
    store(value + offset, narrow<T>(number));
  }
}

// The part of a tensor that begins `offset` elements on.
template <class T>
Numbers part(const Numbers& t, int64_t offset) {
  const auto shift = [&](const void* from) {
    return from ? static_cast<const T*>(from) + offset : nullptr;
  };
  return {shift(t.value), shift(t.derivative)};
}
template <class T>
T* shifted(void* from, int64_t offset) {
  return from ? static_cast<T*>(from) + offset : nullptr;
}

// The masks of one step: `resets` and the zones begin at it.
template <class T>
LayerMasks masks_at(const LayerProblem& p, const LayerMasks& masks, int64_t time) {
  LayerMasks at = masks;
  if (at.resets) at.resets += time * p.batch;
  const auto zone = [&](const void* mask, int64_t elements) {
    return mask ? static_cast<const T*>(mask) + time * elements : nullptr;
  };
  at.zone_h = zone(masks.zone_h, p.states()), at.zone_c = zone(masks.zone_c, p.units());
  return at;
}
template <class T>
WEFT_DEVICE accumulate_t<T> zone(const LayerProblem& p, const void* mask, int64_t element) {
  return mask ? load_or_zero<T>(mask, element) : static_cast<accumulate_t<T>>(p.zoneout);
}

// ---- forward -----------------------------------------------------------------------------------

struct StepInputs {
  int64_t time;
  Numbers sums, h, c, w_hh, b_ih, b_hh, peephole;
  LayerMasks masks;
};

// The product of one plane of a state [B, k] with kGates rows of weights [kGates * H, k] a unit.
template <int kGates, class T, class Acc>
WEFT_DEVICE void state_product(const CellProblem& p, const Place& at, int64_t k, const void* h,
                               const void* dropout, const void* w, Acc* a_tile, Acc* w_tile,
                               Acc (&sum)[kSums]) {
  const auto* state = static_cast<const T*>(h);
  const auto* weights = static_cast<const T*>(w);
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      const bool inside = row < p.batch && column < k;
      a_tile[i] = inside ? widen(load(state + row * k + column)) : Acc{0};
      if (inside && dropout) a_tile[i] *= load_or_zero<T>(dropout, row * k + column);
    }
    for (int i = device::thread_index(); i < kGates * kUnits * kDepth; i += kCellThreads) {
      const int line = i / kDepth;
      const int64_t unit = at.first_unit + line % kUnits, column = first + i % kDepth;
      const int64_t row = line / kUnits * p.hidden + unit;
      w_tile[line * (kDepth + 1) + i % kDepth] =
          unit < p.hidden && column < k ? widen(load(weights + row * k + column)) : Acc{0};
    }
    device::barrier();
    const int depth = k - first < kDepth ? static_cast<int>(k - first) : kDepth;
    for (int i = 0; i < depth; ++i) {
      const Acc value = a_tile[at.local_row * kDepth + i];
      for (int g = 0; g < kGates; ++g)
        sum[g] += value * w_tile[(g * kUnits + at.local_unit) * (kDepth + 1) + i];
    }
    device::barrier();
  }
}

// All planes of it; sums begin at zero.
template <int kGates, class M, class T>
WEFT_DEVICE void number_product(const CellProblem& p, const Place& at, int64_t k, const Numbers& h,
                                const void* dropout, const Numbers& w,
                                typename M::Number (&sums)[kSums]) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kGates * kUnits * (kDepth + 1));
  Acc sum[kSums] = {};
  state_product<kGates, T>(p, at, k, h.value, dropout, w.value, a_tile, w_tile, sum);
  if constexpr (M::kDual) {
    Acc derivative[kSums] = {};
    if (h.derivative)
      state_product<kGates, T>(p, at, k, h.derivative, dropout, w.value, a_tile, w_tile,
                               derivative);
    if (w.derivative)
      state_product<kGates, T>(p, at, k, h.value, dropout, w.derivative, a_tile, w_tile,
                               derivative);
    for (int g = 0; g < kGates; ++g) sums[g] = {sum[g], derivative[g]};
  } else {
    for (int g = 0; g < kGates; ++g) sums[g] = sum[g];
  }
}

template <class T>
int64_t product_bytes(int gates) {
  return (kRows * kDepth + gates * kUnits * (kDepth + 1)) * sizeof(accumulate_t<T>);
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
  number_product<kGates, M, T>(tile, at, p.state(), t.h, t.masks.dropout, t.w_hh, sum);
  if (!at.inside) return;

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
    if (!fresh) s.q[g] = s.q[g] + sum[g];
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
  number_product<1, M, T>(tile, at, p.hidden, inner, nullptr, weights, sum);
  if (!at.inside) return;

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

CellProblem tiles(const LayerProblem& p, int64_t units) {
  CellProblem tile;
  tile.dtype = p.dtype, tile.batch = p.batch, tile.hidden = units;
  return tile;
}
int64_t tile_blocks(const CellProblem& tile) {
  return ceil_div(tile.batch, kRows) * ceil_div(tile.hidden, kUnits);
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
    const StepInputs inputs = {time,
                               part<Acc>(t.sums, time * p.batch * t.sums_row),
                               h,
                               c,
                               t.w_hh,
                               t.b_ih,
                               t.b_hh,
                               t.peephole,
                               masks_at<T>(p, t.masks, time)};
    const bool two = p.has_inner();
    device::launch({"recurrent_layer_step", tile_blocks(cell), kCellThreads,
                    product_bytes<T>(Cell::kResetBefore ? 2 : Cell::kGates), context.stream},
                   layer_step<Cell, T, kDual>, cell, p, inputs, two ? nullptr : h_next,
                   two ? nullptr : h_next_d, c_next, c_next_d, two ? nullptr : output,
                   two ? nullptr : output_d, shifted<T>(t.cells.value, time * units),
                   shifted<T>(t.cells.derivative, time * units), gates, gates_d, inner, inner_d);
    if (two) {
      const Numbers weights =
          Cell::kResetBefore ? part<T>(t.w_hh, 2 * p.hidden * p.hidden) : t.w_hr;
      device::launch({"recurrent_layer_finish", tile_blocks(state), kCellThreads,
                      product_bytes<T>(1), context.stream},
                     layer_finish<Cell, T, kDual>, state, p, inputs, Numbers(t.inner), weights,
                     h_next, h_next_d, output, output_d, gates, gates_d);
    }
    h = {h_next, h_next_d};
    c = {c_next, c_next_d};
  }
}

// ---- backward ----------------------------------------------------------------------------------

struct GateInputs {
  int64_t time;
  Numbers grad_output, gates, cells, c_before, h_before, peephole, grad_h;
  LayerMasks masks;
};

// The gradient of a new state before zoneout; `zoned` takes what passes on to the old one.
template <class M, class T>
WEFT_DEVICE typename M::Number state_gradient(const LayerProblem& p, const GateInputs& t,
                                              int64_t element, typename M::Number& zoned) {
  using Acc = accumulate_t<T>;
  const typename M::Number grad =
      load_number<M, Acc>(t.grad_h, element) + load_number<M, T>(t.grad_output, element);
  if (p.zoneout == 0) return grad;
  const Acc z = zone<T>(p, t.masks.zone_h, element);
  zoned = z * grad;
  return (Acc{1} - z) * grad;
}

// Before the product with W_hr: gradients of the projected state [B, P].
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_project_backward(LayerProblem p, GateInputs t, T* grad_projected,
                                                 T* grad_projected_d, accumulate_t<T>* direct,
                                                 accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  const int64_t at = device::block_index() * device::block_size() + device::thread_index();
  if (at >= p.states()) return;
  const int64_t row = at / p.state();
  N grad = {}, zoned = {};
  if (t.masks.lengths && t.time >= load(t.masks.lengths + row)) {
    zoned = load_number<M, Acc>(t.grad_h, at);
  } else {
    grad = state_gradient<M, T>(p, t, at, zoned);
    if (t.masks.resets && load(t.masks.resets + row)) zoned = N{};
  }
  store_number<M>(grad_projected, grad_projected_d, at, grad);
  store_number<M>(direct, direct_d, at, zoned);
}

// After the product with U_n: `of_reset` [B, H] is the gradient of r h.
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_reset_backward(LayerProblem p, GateInputs t, Numbers of_reset,
                                               T* grad_sums, T* grad_sums_d,
                                               accumulate_t<T>* direct, accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  using Cell = GruResetBeforeLayer;
  const int64_t at = device::block_index() * device::block_size() + device::thread_index();
  if (at >= p.units()) return;
  const int64_t row = at / p.hidden, unit = at % p.hidden;
  if (t.masks.lengths && t.time >= load(t.masks.lengths + row)) return;
  if (t.masks.resets && load(t.masks.resets + row)) return;
  const void* dropout = t.masks.dropout;
  N h = load_number<M, T>(t.h_before, at);
  if (dropout) h = load_or_zero<T>(dropout, at) * h;
  BackwardResults<N> r = Cell::template first_backward<M>(
      load_number<M, T>(t.gates, row * Cell::kKept * p.hidden + unit), h,
      load_number<M, Acc>(of_reset, at));
  if (dropout) r.h = load_or_zero<T>(dropout, at) * r.h;
  store_number<M>(grad_sums, grad_sums_d, row * Cell::kGates * p.hidden + unit, r.x[0]);
  store_number<M>(direct, direct_d, at, load_number<M, Acc>({direct, direct_d}, at) + r.h);
}

// Gradients of one step's gates. `direct` takes what of grad_h does not go through them. With a
// projection grad_h is that of the unprojected state, which goes to `unprojected`.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_gates_backward(
    LayerProblem p, GateInputs t, T* grad_sums, T* grad_sums_d, T* grad_hidden_sums,
    T* grad_hidden_sums_d, accumulate_t<T>* grad_c, accumulate_t<T>* grad_c_d,
    accumulate_t<T>* grad_peephole, accumulate_t<T>* grad_peephole_d, T* unprojected,
    T* unprojected_d, accumulate_t<T>* direct, accumulate_t<T>* direct_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  const int64_t at = device::block_index() * device::block_size() + device::thread_index();
  if (at >= p.units()) return;
  const int64_t row = at / p.hidden, unit = at % p.hidden;
  const auto set = [&](int gate, N of_x, N of_h) {
    const int64_t place = (row * Cell::kGates + gate) * p.hidden + unit;
    store_number<M>(grad_sums, grad_sums_d, place, of_x);
    if (Cell::kTwoSums) store_number<M>(grad_hidden_sums, grad_hidden_sums_d, place, of_h);
  };
  if (t.masks.lengths && t.time >= load(t.masks.lengths + row)) {
    for (int g = 0; g < Cell::kGates; ++g) set(g, N{}, N{});
    if (direct) store_number<M>(direct, direct_d, at, load_number<M, Acc>(t.grad_h, at));
    if (unprojected) store_number<M>(unprojected, unprojected_d, at, N{});
    return;
  }
  const bool fresh = t.masks.resets && load(t.masks.resets + row);
  BackwardArguments<N> s = {};
  N zoned_h = {}, zoned_c = {};
  s.grad_h = p.projection > 0 ? load_number<M, Acc>(t.grad_h, at)
                              : state_gradient<M, T>(p, t, at, zoned_h);
  for (int i = 0; i < Cell::kKept; ++i)
    s.kept[i] = load_number<M, T>(t.gates, (row * Cell::kKept + i) * p.hidden + unit);
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = load_number<M, T>(t.c_before, at);
    s.next_c = load_number<M, T>(t.cells, at);
    s.grad_c = load_number<M, Acc>({grad_c, grad_c_d}, at);
    if (p.zoneout > 0) {
      const Acc z = zone<T>(p, t.masks.zone_c, at);
      zoned_c = z * s.grad_c;
      s.grad_c = (Acc{1} - z) * s.grad_c;
      s.next_c = Cell::template cell_after<M>(s.kept, s.c);
    }
    if (unprojected)
      store_number<M>(unprojected, unprojected_d, at,
                      s.kept[Cell::kOutputGate] * M::tanh(s.next_c));
  }
  if constexpr (Cell::kTwoSums || Cell::kResetBefore) s.h = load_number<M, T>(t.h_before, at);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) s.peephole[i] = load_number<M, T>(t.peephole, i * p.hidden + unit);
  }
  const BackwardResults<N> r = Cell::template backward<M>(s);
  for (int g = 0; g < Cell::kGates; ++g) set(g, r.x[g], r.q[g]);
  if constexpr (Cell::kHasCell) store_number<M>(grad_c, grad_c_d, at, fresh ? N{} : r.c + zoned_c);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) {
      const int64_t place = (row * 3 + i) * p.hidden + unit;
      const N before = load_number<M, Acc>({grad_peephole, grad_peephole_d}, place);
      store_number<M>(grad_peephole, grad_peephole_d, place, before + r.peephole[i]);
    }
  }
  if (direct) store_number<M>(direct, direct_d, at, fresh ? N{} : r.h + zoned_h);
}

// sum += one plane of a [B, k], whose rows are `stride` apart, times one of W [k, units]: tiles as
// in cell_tile.h.
template <class T, class Acc>
WEFT_DEVICE void add_back(const CellProblem& p, const Place& at, int64_t k, int64_t stride,
                          const void* gradients, const void* weights, Acc* a_tile, Acc* w_tile,
                          Acc& sum) {
  const auto* a = static_cast<const T*>(gradients);
  const auto* w = static_cast<const T*>(weights);
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      a_tile[i] = row < p.batch && column < k ? widen(load(a + row * stride + column)) : Acc{0};
    }
    for (int i = device::thread_index(); i < kDepth * kUnits; i += kCellThreads) {
      const int64_t row = first + i / kUnits, unit = at.first_unit + i % kUnits;
      w_tile[i] = row < k && unit < p.hidden ? widen(load(w + row * p.hidden + unit)) : Acc{0};
    }
    device::barrier();
    for (int i = 0; i < kDepth; ++i)
      sum += a_tile[at.local_row * kDepth + i] * w_tile[i * kUnits + at.local_unit];
    device::barrier();
  }
}

struct ProductInputs {
  int64_t k, stride;  // terms; from one row of the gradients to the next
  Numbers gradients, weights, direct;
  const void* dropout;
  const bool* resets;  // of this step
};

// out [B, units] = direct + dropout * (gradients times weights [k, units]); a fresh row takes
// direct alone.
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_product_backward(CellProblem p, ProductInputs t,
                                                 accumulate_t<T>* out, accumulate_t<T>* out_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kDepth * kUnits);
  const Place at = place_of_thread(p);
  Acc sum = 0;
  [[maybe_unused]] Acc derivative = 0;
  const auto add = [&](const void* gradients, const void* weights, Acc& to) {
    add_back<T>(p, at, t.k, t.stride, gradients, weights, a_tile, w_tile, to);
  };
  add(t.gradients.value, t.weights.value, sum);
  if constexpr (kDual) {
    add(t.gradients.derivative, t.weights.value, derivative);
    if (t.weights.derivative) add(t.gradients.value, t.weights.derivative, derivative);
  }
  if (!at.inside) return;
  const int64_t element = at.row * p.hidden + at.unit;
  N grad = {};
  if (!(t.resets && load(t.resets + at.row))) {
    if constexpr (kDual) {
      grad = {sum, derivative};
    } else {
      grad = sum;
    }
    if (t.dropout) grad = load_or_zero<T>(t.dropout, element) * grad;
  }
  store_number<M>(out, out_d, element, load_number<M, Acc>(t.direct, element) + grad);
}

template <class Cell, class T, bool kDual>
void backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t hidden = p.hidden, units = p.units(), states = p.states();
  const int64_t columns = p.gates() * hidden;
  const bool projects = p.projection > 0;
  const CellProblem cell = tiles(p, hidden), state = tiles(p, p.state());
  const int64_t shared = (kRows * kDepth + kDepth * kUnits) * sizeof(Acc);
  const auto product = [&](const CellProblem& tile, const ProductInputs& inputs,
                           const NumbersOut& out) {
    device::launch({"recurrent_layer_product_backward", tile_blocks(tile), kCellThreads, shared,
                    context.stream},
                   layer_product_backward<T, kDual>, tile, inputs, static_cast<Acc*>(out.value),
                   static_cast<Acc*>(out.derivative));
  };
  const auto elements = [&](const char* kernel, int64_t count) {
    return device::Launch{kernel, ceil_div(count, kElementThreads), kElementThreads, 0,
                          context.stream};
  };
  Acc *direct = static_cast<Acc*>(t.direct.value),
      *direct_d = static_cast<Acc*>(t.direct.derivative);
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t time = p.time(s), at = time * units, sums = time * p.batch * columns;
    const Numbers c_before = s == 0 ? t.c0 : part<T>(t.cells, p.time(s - 1) * units);
    const LayerMasks masks = masks_at<T>(p, t.masks, time);
    GateInputs inputs = {time,
                         part<T>(t.grad_output, time * states),
                         part<T>(t.gates, Cell::kKept * at),
                         part<T>(t.cells, at),
                         c_before,
                         part<T>(t.h_before, at),
                         t.peephole,
                         t.grad_h,
                         masks};
    if (projects) {
      device::launch(elements("recurrent_layer_project_backward", states),
                     layer_project_backward<T, kDual>, p, inputs,
                     shifted<T>(t.grad_projected.value, time * states),
                     shifted<T>(t.grad_projected.derivative, time * states), direct, direct_d);
      product(cell,
              {p.projection,
               p.projection,
               part<T>(t.grad_projected, time * states),
               t.w_hr,
               {},
               nullptr,
               nullptr},
              t.inner);
      inputs.grad_h = t.inner;
    }
    T *grad_sums = shifted<T>(t.grad_sums.value, sums),
      *grad_sums_d = shifted<T>(t.grad_sums.derivative, sums);
    device::launch(
        elements("recurrent_layer_gates_backward", units), layer_gates_backward<Cell, T, kDual>, p,
        inputs, grad_sums, grad_sums_d, shifted<T>(t.grad_hidden_sums.value, sums),
        shifted<T>(t.grad_hidden_sums.derivative, sums), static_cast<Acc*>(t.grad_c.value),
        static_cast<Acc*>(t.grad_c.derivative), static_cast<Acc*>(t.grad_peephole.value),
        static_cast<Acc*>(t.grad_peephole.derivative), shifted<T>(t.unprojected.value, at),
        shifted<T>(t.unprojected.derivative, at), projects ? nullptr : direct,
        projects ? nullptr : direct_d);
    const Numbers fed = part<T>(t.grad_hidden_sums.value ? t.grad_hidden_sums : t.grad_sums, sums);
    int64_t k = columns;
    if constexpr (Cell::kResetBefore) {  // U_n, the last third of W_hh, comes first
      k = 2 * hidden;
      product(cell,
              {hidden, columns, part<T>(fed, k), part<T>(t.w_hh, k * hidden), {}, nullptr, nullptr},
              t.inner);
      device::launch(elements("recurrent_layer_reset_backward", units),
                     layer_reset_backward<T, kDual>, p, inputs, Numbers(t.inner), grad_sums,
                     grad_sums_d, direct, direct_d);
    }
    product(state, {k, columns, fed, t.w_hh, t.direct, masks.dropout, masks.resets}, t.grad_h);
  }
}

// ---- dispatch ----------------------------------------------------------------------------------

// Calls `body` with the cell, the element type and whether numbers are dual.
template <class Body>
void dispatch(const LayerProblem& p, const Body& body) {
  dispatch_cell(p.cell, [&](auto cell) {
    if (p.dual) {
      if (p.dtype == DType::f64) return body(cell, TypeTag<double>{}, std::true_type{});
      return body(cell, TypeTag<float>{}, std::true_type{});
    }
    dispatch_dtype(p.dtype, [&](auto tag) { body(cell, tag, std::false_type{}); });
  });
}

void launch_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  dispatch(p, [&](auto cell, auto tag, auto dual) {
    forward<decltype(cell), typename decltype(tag)::type, decltype(dual)::value>(p, t, context);
  });
}

void launch_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  dispatch(p, [&](auto cell, auto tag, auto dual) {
    backward<decltype(cell), typename decltype(tag)::type, decltype(dual)::value>(p, t, context);
  });
}

}  // namespace

const LayerKernels layer_kernels = {launch_forward, launch_backward};

}  // namespace weft::WEFT_TARGET
