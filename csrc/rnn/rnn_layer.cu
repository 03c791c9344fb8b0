// Whole sequences of a recurrent layer on CUDA: a fused kernel a step.
//
// Forward: the hidden state's product as in rnn.cu, with the gates as its epilogue; the state
// passes from step to step through two buffers in memory. Backward: an elementwise kernel for the
// gates' gradients, one thread per row and unit, and a tile product with W_hh for the gradient one
// step before. Bound: launches and the bytes of W_hh, which every step reads again.
#include <cmath>
#include <type_traits>

#include "core/window.h"
#include "device/device.h"
#include "rnn/cell_math.h"
#include "rnn/cell_tile.h"
#include "rnn/rnn_layer.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kElementThreads = 256;

template <class T>
WEFT_DEVICE accumulate_t<T> load_or_zero(const T* address, int64_t offset) {
  return address ? widen(load(address + offset)) : accumulate_t<T>{0};
}

// ---- forward -----------------------------------------------------------------------------------

// `cells`, `gates` and `output` are those of this step; `sums` too.
template <class Cell, class T>
WEFT_GLOBAL WEFT_HOT void layer_step(CellProblem p, int64_t time, const int64_t* lengths,
                                     const accumulate_t<T>* sums, const T* h, const T* c,
                                     const T* w_hh, const T* b_ih, const T* b_hh, T* h_next,
                                     T* c_next, T* output, T* cells, T* gates) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(Cell::kGates * kUnits * (kDepth + 1));
  const Place at = place_of_thread(p);
  Acc sum[kSums] = {};
  add_product<Cell, true>(p, at, h, w_hh, p.hidden, a_tile, w_tile, sum);
  if (!at.inside) return;

  const int64_t element = at.row * p.hidden + at.unit;
  const bool ended = lengths && time >= load(lengths + at.row);
  for (int g = 0; g < Cell::kGates; ++g) {
    const int64_t column = g * p.hidden + at.unit;
    sum[Cell::input_column(g)] +=
        load(sums + at.row * Cell::kGates * p.hidden + column) + load_or_zero(b_ih, column);
    sum[Cell::hidden_column(g)] += load_or_zero(b_hh, column);
  }
  Acc next = 0, kept[kSums] = {}, next_cell = 0;
  if constexpr (std::is_same_v<Cell, Elman<false>>) {
    next = std::tanh(sum[0]);
  } else if constexpr (std::is_same_v<Cell, Elman<true>>) {
    next = sum[0] < Acc{0} ? Acc{0} : sum[0];  // NaN stays NaN
  } else if constexpr (std::is_same_v<Cell, Lstm>) {
    const LstmGates<Acc> s = {sigmoid(sum[0]), sigmoid(sum[1]), std::tanh(sum[2]), sigmoid(sum[3])};
    next_cell = lstm_next_cell(s, Acc{widen(load(c + element))});
    next = s.o * std::tanh(next_cell);
    kept[0] = s.i, kept[1] = s.f, kept[2] = s.g, kept[3] = s.o;
  } else {
    const Acc r = sigmoid(sum[0]), z = sigmoid(sum[1]), q = sum[3];
    const Acc n = std::tanh(sum[2] + r * q);
    next = gru_next_hidden(z, n, Acc{widen(load(h + element))});
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = q;
  }
  store(h_next + element, ended ? load(h + element) : narrow<T>(next));
  store(output + element, ended ? T{} : narrow<T>(next));
  if constexpr (std::is_same_v<Cell, Lstm>) {
    const T cell = ended ? load(c + element) : narrow<T>(next_cell);
    store(c_next + element, cell);
    if (cells) store(cells + element, cell);
  }
  if (gates == nullptr) return;
  for (int i = 0; i < kSums; ++i)
    store(gates + (at.row * kSums + i) * p.hidden + at.unit, ended ? T{} : narrow<T>(kept[i]));
}

template <class Cell, class T>
void forward(const char* kernel, const LayerProblem& p, const LayerForward& t,
             const Context& context) {
  using Acc = accumulate_t<T>;
  CellProblem cell;
  cell.dtype = p.dtype, cell.batch = p.batch, cell.hidden = p.hidden;
  const int64_t units = p.units();
  const int64_t shared = (kRows * kDepth + Cell::kGates * kUnits * (kDepth + 1)) * sizeof(Acc);
  const int64_t blocks = ceil_div(p.batch, kRows) * ceil_div(p.hidden, kUnits);
  const auto *h = static_cast<const T*>(t.h0), *c = static_cast<const T*>(t.c0);
  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t time = p.time(s), at = time * units;
    const bool last = s == p.steps - 1;
    T* h_next = last ? static_cast<T*>(t.h_n) : static_cast<T*>(t.states) + s % 2 * units;
    T* c_next = nullptr;
    if (t.c0)
      c_next = last ? static_cast<T*>(t.c_n) : static_cast<T*>(t.cell_states) + s % 2 * units;
    device::launch({kernel, blocks, kCellThreads, shared, context.stream}, layer_step<Cell, T>,
                   cell, time, t.lengths,
                   static_cast<const Acc*>(t.sums) + time * p.batch * t.sums_row, h, c,
                   static_cast<const T*>(t.w_hh), static_cast<const T*>(t.b_ih),
                   static_cast<const T*>(t.b_hh), h_next, c_next, static_cast<T*>(t.output) + at,
                   t.cells ? static_cast<T*>(t.cells) + at : nullptr,
                   t.gates ? static_cast<T*>(t.gates) + 4 * at : nullptr);
    h = h_next;
    c = c_next;
  }
}

void launch_forward(const LayerProblem& p, const LayerForward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    switch (p.cell) {
      case LayerCell::lstm:
        return forward<Lstm, T>("lstm_layer", p, t, context);
      case LayerCell::gru:
        return forward<Gru, T>("gru_layer", p, t, context);
      case LayerCell::tanh:
        return forward<Elman<false>, T>("rnn_tanh_layer", p, t, context);
      case LayerCell::relu:
        return forward<Elman<true>, T>("rnn_relu_layer", p, t, context);
    }
  });
}

// ---- backward ----------------------------------------------------------------------------------

// Gradients of one step's gates. `direct` takes what of grad_h does not go through them.
template <class T>
WEFT_GLOBAL WEFT_HOT void layer_gates_backward(LayerProblem p, int64_t time, const int64_t* lengths,
                                               const T* grad_output, const T* gates, const T* cells,
                                               const T* c_before, const T* h_before,
                                               const T* output, const accumulate_t<T>* grad_h,
                                               T* grad_sums, T* grad_hidden_sums,
                                               accumulate_t<T>* grad_c, accumulate_t<T>* direct) {
  using Acc = accumulate_t<T>;
  const int64_t at = device::block_index() * device::block_size() + device::thread_index();
  if (at >= p.units()) return;
  const int64_t row = at / p.hidden, unit = at % p.hidden, columns = p.gates();
  const auto set = [&](int gate, Acc of_x, Acc of_h) {
    const int64_t place = (row * columns + gate) * p.hidden + unit;
    store(grad_sums + place, narrow<T>(of_x));
    if (grad_hidden_sums) store(grad_hidden_sums + place, narrow<T>(of_h));
  };
  Acc grad = load(grad_h + at);
  if (lengths && time >= load(lengths + row)) {
    for (int g = 0; g < columns; ++g) set(g, 0, 0);
    store(direct + at, grad);
    return;
  }
  grad += load_or_zero(grad_output, at);
  const auto gate = [&](int i) -> Acc {
    return widen(load(gates + (row * kSums + i) * p.hidden + unit));
  };
  Acc rest = 0;
  if (p.cell == LayerCell::lstm) {
    const auto g = lstm_backward<Acc>(
        {gate(0), gate(1), gate(2), gate(3)}, widen(load(c_before + at)),
        std::tanh(Acc{widen(load(cells + at))}), grad, load(grad_c + at), Acc{1});
    set(0, g.gates.i, g.gates.i);
    set(1, g.gates.f, g.gates.f);
    set(2, g.gates.g, g.gates.g);
    set(3, g.gates.o, g.gates.o);
    store(grad_c + at, g.c);
  } else if (p.cell == LayerCell::gru) {
    const auto g = gru_backward<Acc>({gate(0), gate(1), gate(2), gate(3)},
                                     widen(load(h_before + at)), grad, Acc{1});
    set(0, g.gates.r, g.gates.r);
    set(1, g.gates.z, g.gates.z);
    set(2, g.gates.n, g.gates.q);
    rest = g.h;
  } else {
    const Acc y = widen(load(output + at));
    const Acc of_sum =
        p.cell == LayerCell::relu ? (y <= Acc{0} ? Acc{0} : grad) : grad * tanh_slope(y, Acc{1});
    set(0, of_sum, of_sum);
  }
  store(direct + at, rest);
}

// grad_h [B, H] = direct + a [B, k] W [k, H]: tiles as in cell_tile.h.
template <class T>
WEFT_GLOBAL WEFT_HOT void layer_state_backward(CellProblem p, int64_t k, const T* a, const T* w,
                                               const accumulate_t<T>* direct,
                                               accumulate_t<T>* grad_h) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kDepth * kUnits);
  const Place at = place_of_thread(p);
  Acc sum = 0;
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
  if (!at.inside) return;
  const int64_t element = at.row * p.hidden + at.unit;
  store(grad_h + element, load(direct + element) + sum);
}

template <class T>
void backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  using Acc = accumulate_t<T>;
  CellProblem cell;
  cell.dtype = p.dtype, cell.batch = p.batch, cell.hidden = p.hidden;
  const int64_t units = p.units(), columns = p.gates() * p.hidden;
  const auto step_of = [&](const void* memory, int64_t time, int64_t count) {
    return memory ? static_cast<const T*>(memory) + time * units * count : nullptr;
  };
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t time = p.time(s), sums = time * p.batch * columns;
    T* grad_sums = static_cast<T*>(t.grad_sums) + sums;
    T* grad_hidden = t.grad_hidden_sums ? static_cast<T*>(t.grad_hidden_sums) + sums : nullptr;
    const T* c_before = s == 0 ? static_cast<const T*>(t.c0) : step_of(t.cells, p.time(s - 1), 1);
    device::launch({"layer_gates_backward", ceil_div(units, kElementThreads), kElementThreads, 0,
                    context.stream},
                   layer_gates_backward<T>, p, time, t.lengths, step_of(t.grad_output, time, 1),
                   step_of(t.gates, time, 4), step_of(t.cells, time, 1), c_before,
                   step_of(t.h_before, time, 1), step_of(t.output, time, 1),
                   static_cast<const Acc*>(t.grad_h), grad_sums, grad_hidden,
                   static_cast<Acc*>(t.grad_c), static_cast<Acc*>(t.direct));
    const int64_t shared = (kRows * kDepth + kDepth * kUnits) * sizeof(Acc);
    device::launch({"layer_state_backward", ceil_div(p.batch, kRows) * ceil_div(p.hidden, kUnits),
                    kCellThreads, shared, context.stream},
                   layer_state_backward<T>, cell, columns, grad_hidden ? grad_hidden : grad_sums,
                   static_cast<const T*>(t.w_hh), static_cast<const Acc*>(t.direct),
                   static_cast<Acc*>(t.grad_h));
  }
}

void launch_backward(const LayerProblem& p, const LayerBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(p, t, context); });
}

}  // namespace

const LayerKernels layer_kernels = {launch_forward, launch_backward};

}  // namespace weft::WEFT_TARGET
