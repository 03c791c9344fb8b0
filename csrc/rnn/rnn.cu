// Recurrent cells on CUDA.
//
// Forward is the tile product x W_ih^T + h W_hh^T with the gates as its epilogue: a block owns
// kRows batch rows by kUnits hidden units, a thread one of each, with its four sums in registers.
// Tiles of kDepth columns of the activations and of the units' weight rows pass through shared
// memory; consecutive threads load consecutive columns, so loads coalesce. The columns of a weight
// row are kDepth + 1 apart, which keeps 16 units' reads in different banks. Bound: FMA rate and
// shared-memory reads for large batches, weight bytes for small ones.
//
// Backward and double backward are elementwise, one thread per row and unit; bound: bytes.
#include <cmath>
#include <type_traits>

#include "core/window.h"
#include "device/device.h"
#include "rnn/cell_math.h"
#include "rnn/cell_tile.h"
#include "rnn/rnn.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kElementThreads = 256;

// ---- forward -----------------------------------------------------------------------------------

template <class Cell, class T>
WEFT_GLOBAL WEFT_HOT void cell_forward(CellProblem p, const T* x, const T* h, const T* c,
                                       const T* w_ih, const T* w_hh, const T* b_ih, const T* b_hh,
                                       T* h_next, T* c_next, T* gates) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(Cell::kGates * kUnits * (kDepth + 1));
  const Place at = place_of_thread(p);
  Acc sum[kSums] = {};
  add_product<Cell, false>(p, at, x, w_ih, p.input, a_tile, w_tile, sum);
  add_product<Cell, true>(p, at, h, w_hh, p.hidden, a_tile, w_tile, sum);
  if (!at.inside) return;

  Acc bias[kSums] = {};
  for (int g = 0; g < Cell::kGates; ++g) {
    if (b_ih) bias[Cell::input_column(g)] += widen(load(b_ih + g * p.hidden + at.unit));
    if (b_hh) bias[Cell::hidden_column(g)] += widen(load(b_hh + g * p.hidden + at.unit));
  }
  for (int i = 0; i < kSums; ++i) sum[i] += bias[i];

  const int64_t element = at.row * p.hidden + at.unit;
  Acc kept[kSums];
  if constexpr (std::is_same_v<Cell, Elman<false>>) {
    store(h_next + element, narrow<T>(std::tanh(sum[0])));
    return;
  } else if constexpr (std::is_same_v<Cell, Elman<true>>) {
    store(h_next + element, narrow<T>(sum[0] < Acc{0} ? Acc{0} : sum[0]));  // NaN stays NaN
    return;
  } else if constexpr (std::is_same_v<Cell, Lstm>) {
    const LstmGates<Acc> s = {sigmoid(sum[0]), sigmoid(sum[1]), std::tanh(sum[2]), sigmoid(sum[3])};
    const Acc next = lstm_next_cell(s, Acc{widen(load(c + element))});
    store(c_next + element, narrow<T>(next));
    store(h_next + element, narrow<T>(s.o * std::tanh(next)));
    kept[0] = s.i, kept[1] = s.f, kept[2] = s.g, kept[3] = s.o;
  } else {
    const Acc r = sigmoid(sum[0]), z = sigmoid(sum[1]), q = sum[3];
    const Acc n = std::tanh(sum[2] + r * q);
    store(h_next + element, narrow<T>(gru_next_hidden(z, n, Acc{widen(load(h + element))})));
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = q;
  }
  if (gates == nullptr) return;
  for (int i = 0; i < kSums; ++i)
    store(gates + (at.row * kSums + i) * p.hidden + at.unit, narrow<T>(kept[i]));
}

// ---- elementwise -------------------------------------------------------------------------------

// The thread's element of [B, H], and its place in [B, Count, H].
struct Element {
  int64_t at, row, unit, hidden;
  bool inside;

  WEFT_HD int64_t in(int count, int column) const { return (row * count + column) * hidden + unit; }
};

WEFT_DEVICE Element element_of_thread(const CellProblem& p) {
  const int64_t at = device::block_index() * device::block_size() + device::thread_index();
  return {at, at / p.hidden, at % p.hidden, p.hidden, at < p.units()};
}

template <class T>
WEFT_DEVICE accumulate_t<T> load_or_zero(const T* address, int64_t offset) {
  return address ? widen(load(address + offset)) : accumulate_t<T>{0};
}

template <class T>
WEFT_GLOBAL WEFT_HOT void lstm_cell_backward(CellProblem p, const T* grad_h, const T* grad_c,
                                             const T* gates, const T* c, const T* c_next,
                                             T* grad_gates, T* grad_c_prev) {
  using Acc = accumulate_t<T>;
  const Element e = element_of_thread(p);
  if (!e.inside) return;
  const auto s = [&](int i) -> Acc { return widen(load(gates + e.in(4, i))); };
  const auto g = lstm_backward<Acc>({s(0), s(1), s(2), s(3)}, widen(load(c + e.at)),
                                    std::tanh(Acc{widen(load(c_next + e.at))}),
                                    load_or_zero(grad_h, e.at), load_or_zero(grad_c, e.at), Acc{1});
  store(grad_gates + e.in(4, 0), narrow<T>(g.gates.i));
  store(grad_gates + e.in(4, 1), narrow<T>(g.gates.f));
  store(grad_gates + e.in(4, 2), narrow<T>(g.gates.g));
  store(grad_gates + e.in(4, 3), narrow<T>(g.gates.o));
  store(grad_c_prev + e.at, narrow<T>(g.c));
}

template <class T>
WEFT_GLOBAL void lstm_cell_double_backward(CellProblem p, const T* u_gates, const T* u_c,
                                           const T* grad_h, const T* grad_c, const T* gates,
                                           const T* c, T* of_grad_h, T* of_grad_c, T* of_gates,
                                           T* of_c) {
  using Acc = accumulate_t<T>;
  const Element e = element_of_thread(p);
  if (!e.inside) return;
  const auto s = [&](int i) -> Acc { return widen(load(gates + e.in(4, i))); };
  const auto u = [&](int i) { return load_or_zero(u_gates, e.in(4, i)); };
  const LstmGates<Acc> kept = {s(0), s(1), s(2), s(3)};
  const Acc cell = widen(load(c + e.at));
  const auto g =
      lstm_double_backward<Acc>(kept, cell, std::tanh(lstm_next_cell(kept, cell)),
                                load_or_zero(grad_h, e.at), load_or_zero(grad_c, e.at),
                                {u(0), u(1), u(2), u(3)}, load_or_zero(u_c, e.at), Acc{0}, Acc{1});
  store(of_grad_h + e.at, narrow<T>(g.grad_h));
  store(of_grad_c + e.at, narrow<T>(g.grad_c));
  store(of_gates + e.in(4, 0), narrow<T>(g.gates.i));
  store(of_gates + e.in(4, 1), narrow<T>(g.gates.f));
  store(of_gates + e.in(4, 2), narrow<T>(g.gates.g));
  store(of_gates + e.in(4, 3), narrow<T>(g.gates.o));
  store(of_c + e.at, narrow<T>(g.c));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void gru_cell_backward(CellProblem p, const T* grad_h, const T* gates,
                                            const T* h, T* grad_x_gates, T* grad_h_gates,
                                            T* grad_h_prev) {
  using Acc = accumulate_t<T>;
  const Element e = element_of_thread(p);
  if (!e.inside) return;
  const auto s = [&](int i) -> Acc { return widen(load(gates + e.in(4, i))); };
  const auto g = gru_backward<Acc>({s(0), s(1), s(2), s(3)}, widen(load(h + e.at)),
                                   widen(load(grad_h + e.at)), Acc{1});
  store(grad_x_gates + e.in(3, 0), narrow<T>(g.gates.r));
  store(grad_x_gates + e.in(3, 1), narrow<T>(g.gates.z));
  store(grad_x_gates + e.in(3, 2), narrow<T>(g.gates.n));
  store(grad_h_gates + e.in(3, 0), narrow<T>(g.gates.r));
  store(grad_h_gates + e.in(3, 1), narrow<T>(g.gates.z));
  store(grad_h_gates + e.in(3, 2), narrow<T>(g.gates.q));
  store(grad_h_prev + e.at, narrow<T>(g.h));
}

template <class T>
WEFT_GLOBAL void gru_cell_double_backward(CellProblem p, const T* u_x, const T* u_h,
                                          const T* u_prev, const T* grad_h, const T* gates,
                                          const T* h, T* of_grad_h, T* of_gates, T* of_h) {
  using Acc = accumulate_t<T>;
  const Element e = element_of_thread(p);
  if (!e.inside) return;
  const auto s = [&](int i) -> Acc { return widen(load(gates + e.in(4, i))); };
  const auto x = [&](int i) { return load_or_zero(u_x, e.in(3, i)); };
  const auto hidden = [&](int i) { return load_or_zero(u_h, e.in(3, i)); };
  const auto g = gru_double_backward<Acc>({s(0), s(1), s(2), s(3)}, widen(load(h + e.at)),
                                          widen(load(grad_h + e.at)),
                                          {x(0) + hidden(0), x(1) + hidden(1), x(2), hidden(2)},
                                          load_or_zero(u_prev, e.at), Acc{0}, Acc{1});
  store(of_grad_h + e.at, narrow<T>(g.grad_h));
  store(of_gates + e.in(4, 0), narrow<T>(g.gates.r));
  store(of_gates + e.in(4, 1), narrow<T>(g.gates.z));
  store(of_gates + e.in(4, 2), narrow<T>(g.gates.n));
  store(of_gates + e.in(4, 3), narrow<T>(g.gates.q));
  store(of_h + e.at, narrow<T>(g.h));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void rnn_cell_backward(CellProblem p, const T* grad_h, const T* h_next,
                                            T* grad_sums, bool relu) {
  using Acc = accumulate_t<T>;
  const Element e = element_of_thread(p);
  if (!e.inside) return;
  const Acc grad = widen(load(grad_h + e.at)), y = widen(load(h_next + e.at));
  const Acc of_sum = relu ? (y <= Acc{0} ? Acc{0} : grad) : grad * tanh_slope(y, Acc{1});
  store(grad_sums + e.at, narrow<T>(of_sum));
}

// ---- launchers ---------------------------------------------------------------------------------

template <class Cell>
void launch_cell(const char* kernel, const CellProblem& p, const CellForward& t,
                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t shared =
        (kRows * kDepth + Cell::kGates * kUnits * (kDepth + 1)) * sizeof(accumulate_t<T>);
    const int64_t blocks = ceil_div(p.batch, kRows) * ceil_div(p.hidden, kUnits);
    device::launch({kernel, blocks, kCellThreads, shared, context.stream}, cell_forward<Cell, T>, p,
                   static_cast<const T*>(t.x), static_cast<const T*>(t.h),
                   static_cast<const T*>(t.c), static_cast<const T*>(t.w_ih),
                   static_cast<const T*>(t.w_hh), static_cast<const T*>(t.b_ih),
                   static_cast<const T*>(t.b_hh), static_cast<T*>(t.h_next),
                   static_cast<T*>(t.c_next), static_cast<T*>(t.gates));
  });
}

void launch_lstm_cell(const CellProblem& p, const CellForward& t, const Context& context) {
  launch_cell<Lstm>("lstm_cell", p, t, context);
}
void launch_gru_cell(const CellProblem& p, const CellForward& t, const Context& context) {
  launch_cell<Gru>("gru_cell", p, t, context);
}

void launch_rnn_tanh_cell(const CellProblem& p, const CellForward& t, const Context& context) {
  launch_cell<Elman<false>>("rnn_tanh_cell", p, t, context);
}
void launch_rnn_relu_cell(const CellProblem& p, const CellForward& t, const Context& context) {
  launch_cell<Elman<true>>("rnn_relu_cell", p, t, context);
}

device::Launch one_thread_each(const char* kernel, const CellProblem& p, const Context& context) {
  return {kernel, ceil_div(p.units(), kElementThreads), kElementThreads, 0, context.stream};
}

void launch_lstm_backward(const CellProblem& p, const LstmBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(one_thread_each("lstm_cell_backward", p, context), lstm_cell_backward<T>, p,
                   static_cast<const T*>(t.grad_h), static_cast<const T*>(t.grad_c),
                   static_cast<const T*>(t.gates), static_cast<const T*>(t.c),
                   static_cast<const T*>(t.c_next), static_cast<T*>(t.grad_gates),
                   static_cast<T*>(t.grad_c_prev));
  });
}

void launch_lstm_double_backward(const CellProblem& p, const LstmDoubleBackward& t,
                                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(
        one_thread_each("lstm_cell_double_backward", p, context), lstm_cell_double_backward<T>, p,
        static_cast<const T*>(t.u_gates), static_cast<const T*>(t.u_c),
        static_cast<const T*>(t.grad_h), static_cast<const T*>(t.grad_c),
        static_cast<const T*>(t.gates), static_cast<const T*>(t.c), static_cast<T*>(t.of_grad_h),
        static_cast<T*>(t.of_grad_c), static_cast<T*>(t.of_gates), static_cast<T*>(t.of_c));
  });
}

void launch_gru_backward(const CellProblem& p, const GruBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(one_thread_each("gru_cell_backward", p, context), gru_cell_backward<T>, p,
                   static_cast<const T*>(t.grad_h), static_cast<const T*>(t.gates),
                   static_cast<const T*>(t.h), static_cast<T*>(t.grad_x_gates),
                   static_cast<T*>(t.grad_h_gates), static_cast<T*>(t.grad_h_prev));
  });
}

void launch_gru_double_backward(const CellProblem& p, const GruDoubleBackward& t,
                                const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(
        one_thread_each("gru_cell_double_backward", p, context), gru_cell_double_backward<T>, p,
        static_cast<const T*>(t.u_x), static_cast<const T*>(t.u_h), static_cast<const T*>(t.u_prev),
        static_cast<const T*>(t.grad_h), static_cast<const T*>(t.gates), static_cast<const T*>(t.h),
        static_cast<T*>(t.of_grad_h), static_cast<T*>(t.of_gates), static_cast<T*>(t.of_h));
  });
}

void launch_rnn_backward(const CellProblem& p, const ElmanBackward& t, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(one_thread_each("rnn_cell_backward", p, context), rnn_cell_backward<T>, p,
                   static_cast<const T*>(t.grad_h), static_cast<const T*>(t.h_next),
                   static_cast<T*>(t.grad_sums), t.relu);
  });
}

}  // namespace

const RnnKernels rnn_kernels = {
    launch_lstm_cell,     launch_lstm_backward, launch_lstm_double_backward,
    launch_gru_cell,      launch_gru_backward,  launch_gru_double_backward,
    launch_rnn_tanh_cell, launch_rnn_relu_cell, launch_rnn_backward};

}  // namespace weft::WEFT_TARGET
