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
  const auto zone = [&](const void* mask) {
    return mask ? static_cast<const T*>(mask) + time * p.units() : nullptr;
  };
  at.zone_h = zone(masks.zone_h), at.zone_c = zone(masks.zone_c);
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

// The product of one plane of h with one of W_hh, from zero.
template <class Cell, class T, class Acc>
WEFT_DEVICE void state_product(const CellProblem& p, const Place& at, const void* h,
                               const void* dropout, const void* w, Acc* a_tile, Acc* w_tile,
                               Acc (&sum)[kSums]) {
  const auto* state = static_cast<const T*>(h);
  const auto* weights = static_cast<const T*>(w);
  const int64_t k = p.hidden;
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      const bool inside = row < p.batch && column < k;
      a_tile[i] = inside ? widen(load(state + row * k + column)) : Acc{0};
      if (inside && dropout) a_tile[i] *= load_or_zero<T>(dropout, row * k + column);
    }
    for (int i = device::thread_index(); i < Cell::kGates * kUnits * kDepth; i += kCellThreads) {
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
      for (int g = 0; g < Cell::kGates; ++g)
        sum[g] += value * w_tile[(g * kUnits + at.local_unit) * (kDepth + 1) + i];
    }
    device::barrier();
  }
}

// Tensors are those of this step. `_d` are derivatives.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_step(CellProblem tile, LayerProblem p, StepInputs t, T* h_next,
                                     T* h_next_d, T* c_next, T* c_next_d, T* output, T* output_d,
                                     T* cells, T* cells_d, T* gates, T* gates_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(Cell::kGates * kUnits * (kDepth + 1));
  const Place at = place_of_thread(tile);
  Acc sum[kSums] = {};
  [[maybe_unused]] Acc derivative[kSums] = {};
  const void* dropout = t.masks.dropout;
  state_product<Cell, T>(tile, at, t.h.value, dropout, t.w_hh.value, a_tile, w_tile, sum);
  if constexpr (kDual) {
    if (t.h.derivative)
      state_product<Cell, T>(tile, at, t.h.derivative, dropout, t.w_hh.value, a_tile, w_tile,
                             derivative);
    if (t.w_hh.derivative)
      state_product<Cell, T>(tile, at, t.h.value, dropout, t.w_hh.derivative, a_tile, w_tile,
                             derivative);
  }
  if (!at.inside) return;

  const int64_t element = at.row * p.hidden + at.unit;
  if (t.masks.lengths && t.time >= load(t.masks.lengths + at.row)) {
    store_number<M>(h_next, h_next_d, element, load_number<M, T>(t.h, element));
    store_number<M>(output, output_d, element, N{});
    if constexpr (Cell::kHasCell) {
      const N c = load_number<M, T>(t.c, element);
      store_number<M>(c_next, c_next_d, element, c);
      if (cells) store_number<M>(cells, cells_d, element, c);
    }
    for (int i = 0; gates && i < Cell::kKept; ++i)
      store_number<M>(gates, gates_d, (at.row * Cell::kKept + i) * p.hidden + at.unit, N{});
    return;
  }
  const bool fresh = t.masks.resets && load(t.masks.resets + at.row);
  StepArguments<N> s = {};
  for (int g = 0; g < Cell::kGates; ++g) {
    const int64_t column = g * p.hidden + at.unit;
    s.x[g] = load_number<M, Acc>(t.sums, at.row * Cell::kGates * p.hidden + column) +
             load_number<M, T>(t.b_ih, column);
    s.q[g] = load_number<M, T>(t.b_hh, column);
    if (fresh) continue;
    if constexpr (kDual) {
      s.q[g] = s.q[g] + N{sum[g], derivative[g]};
    } else {
      s.q[g] += sum[g];
    }
  }
  if (!fresh) s.h = load_number<M, T>(t.h, element);
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = load_number<M, T>(t.c, element);
  }
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i)
      s.peephole[i] = load_number<M, T>(t.peephole, i * p.hidden + at.unit);
  }
  StepResults<N> r = Cell::template forward<M>(s);
  if (p.zoneout > 0) {
    const Acc z = zone<T>(p, t.masks.zone_h, element);
    r.h = z * s.h + (Acc{1} - z) * r.h;
    if constexpr (Cell::kHasCell) {
      const Acc zc = zone<T>(p, t.masks.zone_c, element);
      r.c = zc * s.c + (Acc{1} - zc) * r.c;
    }
  }
  store_number<M>(h_next, h_next_d, element, r.h);
  store_number<M>(output, output_d, element, r.h);
  if constexpr (Cell::kHasCell) {
    store_number<M>(c_next, c_next_d, element, r.c);
    if (cells) store_number<M>(cells, cells_d, element, r.c);
  }
  for (int i = 0; gates && i < Cell::kKept; ++i)
    store_number<M>(gates, gates_d, (at.row * Cell::kKept + i) * p.hidden + at.unit, r.kept[i]);
}

template <class Cell, class T, bool kDual>
void forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  CellProblem cell;
  cell.dtype = p.dtype, cell.batch = p.batch, cell.hidden = p.hidden;
  const int64_t units = p.units();
  const int64_t shared = (kRows * kDepth + Cell::kGates * kUnits * (kDepth + 1)) * sizeof(Acc);
  const int64_t blocks = ceil_div(p.batch, kRows) * ceil_div(p.hidden, kUnits);
  Numbers h = t.h0, c = t.c0;
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t time = p.time(s), at = time * units;
    const bool last = s == p.steps - 1;
    const auto next = [&](void* final, void* buffers) {
      return last ? static_cast<T*>(final) : shifted<T>(buffers, s % 2 * units);
    };
    T *h_next = next(t.h_n.value, t.states.value),
      *h_next_d = next(t.h_n.derivative, t.states.derivative),
      *c_next = next(t.c_n.value, t.cell_states.value),
      *c_next_d = next(t.c_n.derivative, t.cell_states.derivative);
    const StepInputs inputs = {time,
                               part<Acc>(t.sums, time * p.batch * t.sums_row),
                               h,
                               c,
                               t.w_hh,
                               t.b_ih,
                               t.b_hh,
                               t.peephole,
                               masks_at<T>(p, t.masks, time)};
    device::launch({"recurrent_layer_step", blocks, kCellThreads, shared, context.stream},
                   layer_step<Cell, T, kDual>, cell, p, inputs, h_next, h_next_d, c_next, c_next_d,
                   shifted<T>(t.output.value, at), shifted<T>(t.output.derivative, at),
                   shifted<T>(t.cells.value, at), shifted<T>(t.cells.derivative, at),
                   shifted<T>(t.gates.value, Cell::kKept * at),
                   shifted<T>(t.gates.derivative, Cell::kKept * at));
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

// Gradients of one step's gates. `direct` takes what of grad_h does not go through them.
template <class Cell, class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_gates_backward(LayerProblem p, GateInputs t, T* grad_sums,
                                               T* grad_sums_d, T* grad_hidden_sums,
                                               T* grad_hidden_sums_d, accumulate_t<T>* grad_c,
                                               accumulate_t<T>* grad_c_d,
                                               accumulate_t<T>* grad_peephole,
                                               accumulate_t<T>* grad_peephole_d,
                                               accumulate_t<T>* direct, accumulate_t<T>* direct_d) {
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
  BackwardArguments<N> s = {};
  s.grad_h = load_number<M, Acc>(t.grad_h, at);
  if (t.masks.lengths && t.time >= load(t.masks.lengths + row)) {
    for (int g = 0; g < Cell::kGates; ++g) set(g, N{}, N{});
    store_number<M>(direct, direct_d, at, s.grad_h);
    return;
  }
  const bool fresh = t.masks.resets && load(t.masks.resets + row);
  s.grad_h = s.grad_h + load_number<M, T>(t.grad_output, at);
  for (int i = 0; i < Cell::kKept; ++i)
    s.kept[i] = load_number<M, T>(t.gates, (row * Cell::kKept + i) * p.hidden + unit);
  if constexpr (Cell::kHasCell) {
    if (!fresh) s.c = load_number<M, T>(t.c_before, at);
    s.next_c = load_number<M, T>(t.cells, at);
    s.grad_c = load_number<M, Acc>({grad_c, grad_c_d}, at);
  }
  if constexpr (Cell::kTwoSums) s.h = load_number<M, T>(t.h_before, at);
  if constexpr (Cell::kHasPeephole) {
    for (int i = 0; i < 3; ++i) s.peephole[i] = load_number<M, T>(t.peephole, i * p.hidden + unit);
  }
  N zoned_h = {}, zoned_c = {};
  if (p.zoneout > 0) {
    const Acc z = zone<T>(p, t.masks.zone_h, at);
    zoned_h = z * s.grad_h;
    s.grad_h = (Acc{1} - z) * s.grad_h;
    if constexpr (Cell::kHasCell) {
      const Acc zc = zone<T>(p, t.masks.zone_c, at);
      zoned_c = zc * s.grad_c;
      s.grad_c = (Acc{1} - zc) * s.grad_c;
      s.next_c = Cell::template cell_after<M>(s.kept, s.c);
    }
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
  store_number<M>(direct, direct_d, at, fresh ? N{} : r.h + zoned_h);
}

// sum += one plane of a [B, k] times one of W [k, H]: tiles as in cell_tile.h.
template <class T, class Acc>
WEFT_DEVICE void add_back(const CellProblem& p, const Place& at, int64_t k, const void* gradients,
                          const void* weights, Acc* a_tile, Acc* w_tile, Acc& sum) {
  const auto* a = static_cast<const T*>(gradients);
  const auto* w = static_cast<const T*>(weights);
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      a_tile[i] = row < p.batch && column < k ? widen(load(a + row * k + column)) : Acc{0};
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

struct StateInputs {
  Numbers sums, w_hh, direct;
  const void* dropout;
  const bool* resets;  // of this step
};

// grad_h = direct + dropout * (the sums' gradients times W_hh).
template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void layer_state_backward(CellProblem p, int64_t k, StateInputs t,
                                               accumulate_t<T>* grad_h, accumulate_t<T>* grad_h_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kDepth * kUnits);
  const Place at = place_of_thread(p);
  Acc sum = 0;
  [[maybe_unused]] Acc derivative = 0;
  add_back<T>(p, at, k, t.sums.value, t.w_hh.value, a_tile, w_tile, sum);
  if constexpr (kDual) {
    add_back<T>(p, at, k, t.sums.derivative, t.w_hh.value, a_tile, w_tile, derivative);
    if (t.w_hh.derivative)
      add_back<T>(p, at, k, t.sums.value, t.w_hh.derivative, a_tile, w_tile, derivative);
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
  store_number<M>(grad_h, grad_h_d, element, load_number<M, Acc>(t.direct, element) + grad);
}

template <class Cell, class T, bool kDual>
void backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  CellProblem cell;
  cell.dtype = p.dtype, cell.batch = p.batch, cell.hidden = p.hidden;
  const int64_t units = p.units(), columns = p.gates() * p.hidden;
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t time = p.time(s), at = time * units, sums = time * p.batch * columns;
    const Numbers c_before = s == 0 ? t.c0 : part<T>(t.cells, p.time(s - 1) * units);
    const LayerMasks masks = masks_at<T>(p, t.masks, time);
    const GateInputs inputs = {time,
                               part<T>(t.grad_output, at),
                               part<T>(t.gates, Cell::kKept * at),
                               part<T>(t.cells, at),
                               c_before,
                               part<T>(t.h_before, at),
                               t.peephole,
                               t.grad_h,
                               masks};
    device::launch(
        {"recurrent_layer_gates_backward", ceil_div(units, kElementThreads), kElementThreads, 0,
         context.stream},
        layer_gates_backward<Cell, T, kDual>, p, inputs, shifted<T>(t.grad_sums.value, sums),
        shifted<T>(t.grad_sums.derivative, sums), shifted<T>(t.grad_hidden_sums.value, sums),
        shifted<T>(t.grad_hidden_sums.derivative, sums), static_cast<Acc*>(t.grad_c.value),
        static_cast<Acc*>(t.grad_c.derivative), static_cast<Acc*>(t.grad_peephole.value),
        static_cast<Acc*>(t.grad_peephole.derivative), static_cast<Acc*>(t.direct.value),
        static_cast<Acc*>(t.direct.derivative));
    const int64_t shared = (kRows * kDepth + kDepth * kUnits) * sizeof(Acc);
    const NumbersOut& fed = t.grad_hidden_sums.value ? t.grad_hidden_sums : t.grad_sums;
    const StateInputs product = {part<T>(fed, sums), t.w_hh, t.direct, masks.dropout, masks.resets};
    device::launch(
        {"recurrent_layer_state_backward", ceil_div(p.batch, kRows) * ceil_div(p.hidden, kUnits),
         kCellThreads, shared, context.stream},
        layer_state_backward<T, kDual>, cell, columns, product, static_cast<Acc*>(t.grad_h.value),
        static_cast<Acc*>(t.grad_h.derivative));
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
