// 2-d LSTM on CUDA: one kernel an anti-diagonal.
//
// A block owns kRows rows of the diagonal by kUnits hidden units, a thread one of each: the tile
// product with both predecessors' states (backward: with both successors' gradients), and the cell
// as its epilogue. Bound: launches, and the bytes of the weights, which every diagonal reads again.
#include "rnn/mdlstm.h"
#include "rnn/rnn_layer_tile.h"

namespace weft::WEFT_TARGET {
namespace {

// Which neighbour of `place` a product sees.
enum class Neighbour : uint8_t { above, left, below, right };
WEFT_DEVICE int64_t neighbour_of(const GridPlace& place, Neighbour which) {
  switch (which) {
    case Neighbour::above:
      return place.above;
    case Neighbour::left:
      return place.left;
    case Neighbour::below:
      return place.below;
    default:
      return place.right;
  }
}

// One plane of rows [.., k] of the grid times kGates blocks of weights. `transposed`: weights are
// [k, H], not [kGates * H, k].
template <int kGates, bool kTransposed, class T, class Acc>
WEFT_DEVICE void add_rows(const GridProblem& p, int64_t diagonal, const Place& at, Neighbour which,
                          int64_t k, const void* rows, const void* weights, Acc* a_tile,
                          Acc* w_tile, Acc (&sum)[kGates]) {
  const auto* a = static_cast<const T*>(rows);
  const auto* w = static_cast<const T*>(weights);
  const int64_t count = p.sites(diagonal) * p.batch;
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t index = at.first_row + i / kDepth, column = first + i % kDepth;
      const int64_t row =
          index < count ? neighbour_of(grid_place(p, diagonal, index), which) : int64_t{-1};
      a_tile[i] = row >= 0 && column < k ? widen(load(a + row * k + column)) : Acc{0};
    }
    for (int i = device::thread_index(); i < kGates * kUnits * kDepth; i += kCellThreads) {
      // Neighbouring threads read neighbouring weights.
      const int line = kTransposed ? i % kUnits : i / kDepth;
      const int depth = kTransposed ? i / kUnits : i % kDepth;
      const int64_t unit = at.first_unit + line % kUnits, column = first + depth;
      const int64_t row = line / kUnits * p.hidden + unit;
      const int64_t offset = kTransposed ? column * p.hidden + unit : row * k + column;
      w_tile[line * (kDepth + 1) + depth] =
          unit < p.hidden && column < k ? widen(load(w + offset)) : Acc{0};
    }
    device::barrier();
    for (int i = 0; i < kDepth; ++i) {
      const Acc value = a_tile[at.local_row * kDepth + i];
      for (int g = 0; g < kGates; ++g)
        sum[g] += value * w_tile[(g * kUnits + at.local_unit) * (kDepth + 1) + i];
    }
    device::barrier();
  }
}

// All planes of it.
template <int kGates, bool kTransposed, class M, class T>
WEFT_DEVICE void add_numbers(const GridProblem& p, int64_t diagonal, const Place& at,
                             Neighbour which, int64_t k, const Numbers& rows,
                             const Numbers& weights, accumulate_t<T>* a_tile,
                             accumulate_t<T>* w_tile, typename M::Number (&sums)[kGates]) {
  using Acc = accumulate_t<T>;
  Acc sum[kGates] = {};
  const auto add = [&](const void* a, const void* w, Acc(&to)[kGates]) {
    add_rows<kGates, kTransposed, T>(p, diagonal, at, which, k, a, w, a_tile, w_tile, to);
  };
  add(rows.value, weights.value, sum);
  if constexpr (M::kDual) {
    Acc derivative[kGates] = {};
    add(rows.derivative, weights.value, derivative);
    if (weights.derivative) add(rows.value, weights.derivative, derivative);
    for (int g = 0; g < kGates; ++g) sums[g] = sums[g] + typename M::Number{sum[g], derivative[g]};
  } else {
    for (int g = 0; g < kGates; ++g) sums[g] = sums[g] + sum[g];
  }
}

// A number of the neighbour at `row`, or zero.
template <class M, class T>
WEFT_DEVICE typename M::Number number_of(const Numbers& t, int64_t row, int64_t width,
                                         int64_t column) {
  if (row < 0) return typename M::Number{};
  return load_number<M, T>(t, row * width + column);
}

template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void grid_step_kernel(GridProblem p, int64_t diagonal, CellProblem tile,
                                           GridForward t, T* output, T* output_d, T* cells,
                                           T* cells_d, T* gates, T* gates_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kGridGates * kUnits * (kDepth + 1));
  const Place at = place_of_thread(tile);
  N sums[kGridGates] = {};
  const auto add = [&](Neighbour which, const Numbers& w) {
    add_numbers<kGridGates, false, M, T>(p, diagonal, at, which, p.hidden, {output, output_d}, w,
                                         a_tile, w_tile, sums);
  };
  add(Neighbour::above, t.w_above);
  add(Neighbour::left, t.w_left);
  if (!at.inside) return;
  const GridPlace place = grid_place(p, diagonal, at.row);
  for (int g = 0; g < kGridGates; ++g) {
    const int64_t column = g * p.hidden + at.unit;
    sums[g] = sums[g] + load_number<M, Acc>(t.sums, place.row * kGridGates * p.hidden + column) +
              load_number<M, T>(t.bias, column);
  }
  const Numbers c = {cells, cells_d};
  const GridStep<N> r = grid_step<M>(sums, number_of<M, T>(c, place.above, p.hidden, at.unit),
                                     number_of<M, T>(c, place.left, p.hidden, at.unit));
  for (int g = 0; g < kGridGates; ++g)
    store_number<M>(gates, gates_d, (place.row * kGridGates + g) * p.hidden + at.unit, r.gates[g]);
  store_number<M>(cells, cells_d, place.row * p.hidden + at.unit, r.c);
  store_number<M>(output, output_d, place.row * p.hidden + at.unit, r.h);
}

template <class T, bool kDual>
WEFT_GLOBAL WEFT_HOT void grid_backward_kernel(GridProblem p, int64_t diagonal, CellProblem tile,
                                               GridBackward t, T* grad_sums, T* grad_sums_d,
                                               accumulate_t<T>* grad_cells,
                                               accumulate_t<T>* grad_cells_d) {
  using Acc = accumulate_t<T>;
  using M = LayerMath<T, kDual>;
  using N = typename M::Number;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kUnits * (kDepth + 1));
  const Place at = place_of_thread(tile);
  const int64_t width = kGridGates * p.hidden;
  N sum[1] = {};
  const auto add = [&](Neighbour which, const Numbers& w) {
    add_numbers<1, true, M, T>(p, diagonal, at, which, width, {grad_sums, grad_sums_d}, w, a_tile,
                               w_tile, sum);
  };
  add(Neighbour::below, t.w_above);
  add(Neighbour::right, t.w_left);
  if (!at.inside) return;
  const GridPlace place = grid_place(p, diagonal, at.row);
  const int64_t element = place.row * p.hidden + at.unit;
  N gates[kGridGates];
  for (int g = 0; g < kGridGates; ++g)
    gates[g] = load_number<M, T>(t.gates, place.row * width + g * p.hidden + at.unit);
  const Numbers of_c = {grad_cells, grad_cells_d};
  const N grad_c = number_of<M, Acc>(of_c, place.below, p.hidden, at.unit) *
                       number_of<M, T>(t.gates, place.below, width, p.hidden + at.unit) +
                   number_of<M, Acc>(of_c, place.right, p.hidden, at.unit) *
                       number_of<M, T>(t.gates, place.right, width, 2 * p.hidden + at.unit);
  const GridGradient<N> r =
      grid_backward<M>(gates, load_number<M, T>(t.cells, element),
                       number_of<M, T>(t.cells, place.above, p.hidden, at.unit),
                       number_of<M, T>(t.cells, place.left, p.hidden, at.unit),
                       load_number<M, T>(t.grad_output, element) + sum[0], grad_c);
  store_number<M>(grad_cells, grad_cells_d, element, r.c);
  for (int g = 0; g < kGridGates; ++g)
    store_number<M>(grad_sums, grad_sums_d, place.row * width + g * p.hidden + at.unit, r.sums[g]);
}

CellProblem tile_of(const GridProblem& p, int64_t diagonal) {
  CellProblem tile;
  tile.dtype = p.dtype, tile.batch = p.rows(diagonal), tile.hidden = p.hidden;
  return tile;
}

template <class T>
device::Launch launch_of(const char* kernel, const CellProblem& tile, int gates,
                         const Context& context) {
  const int64_t elements = kRows * kDepth + gates * kUnits * (kDepth + 1);
  return {kernel, tile_blocks(tile), kCellThreads,
          elements * static_cast<int64_t>(sizeof(accumulate_t<T>)), context.stream};
}

// Calls `body` with the element type and whether numbers are dual.
template <class Body>
void dispatch(const GridProblem& p, const Body& body) {
  LayerProblem numbers;
  numbers.dtype = p.dtype, numbers.dual = p.dual;
  dispatch_numbers(numbers, body);
}

void launch_forward(const GridProblem& p, const GridForward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    for (int64_t diagonal = 0; diagonal < p.diagonals(); ++diagonal) {
      const CellProblem tile = tile_of(p, diagonal);
      device::launch(launch_of<T>("grid_lstm", tile, kGridGates, context),
                     grid_step_kernel<T, decltype(dual)::value>, p, diagonal, tile, t,
                     static_cast<T*>(t.output.value), static_cast<T*>(t.output.derivative),
                     static_cast<T*>(t.cells.value), static_cast<T*>(t.cells.derivative),
                     static_cast<T*>(t.gates.value), static_cast<T*>(t.gates.derivative));
    }
  });
}

void launch_backward(const GridProblem& p, const GridBackward& t, const Context& context) {
  dispatch(p, [&](auto tag, auto dual) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    for (int64_t diagonal = p.diagonals() - 1; diagonal >= 0; --diagonal) {
      const CellProblem tile = tile_of(p, diagonal);
      device::launch(launch_of<T>("grid_lstm_backward", tile, 1, context),
                     grid_backward_kernel<T, decltype(dual)::value>, p, diagonal, tile, t,
                     static_cast<T*>(t.grad_sums.value), static_cast<T*>(t.grad_sums.derivative),
                     static_cast<Acc*>(t.grad_cells.value),
                     static_cast<Acc*>(t.grad_cells.derivative));
    }
  });
}

}  // namespace

const GridKernels grid_kernels = {launch_forward, launch_backward};

}  // namespace weft::WEFT_TARGET
