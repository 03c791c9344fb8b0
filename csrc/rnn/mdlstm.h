// A 2-d LSTM over a grid, as plain data (Graves, Fernández, Schmidhuber 2007).
//
// A site has two predecessors, the one above and the one to the left, outside the grid zeros:
//   i, a, b, o = sigmoid(sums), g = tanh(sum), c = a c_above + b c_left + i g, h = o tanh(c)
// with sums = W x + U_above h_above + U_left h_left + bias, rows in the order i, a, b, g, o. Sites
// of one anti-diagonal do not see each other: a step of the kernels is one anti-diagonal, all
// batch rows of its sites together.
//
// As the layers of rnn_layer.h, everything may be run on dual numbers, which gives double backward.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"
#include "rnn/cell_math.h"
#include "rnn/rnn_layer.h"

namespace weft {

constexpr int kGridGates = 5;

struct GridProblem {
  DType dtype = DType::f32;
  int64_t height = 0;  // Y
  int64_t width = 0;   // X
  int64_t batch = 0;   // B
  int64_t hidden = 1;  // H
  bool dual = false;   // float32 and float64 only

  WEFT_HD constexpr int64_t diagonals() const { return height + width - 1; }
  // Sites of an anti-diagonal: from row `first_y` on, one in each row.
  WEFT_HD constexpr int64_t first_y(int64_t diagonal) const {
    return diagonal < width ? 0 : diagonal - width + 1;
  }
  WEFT_HD constexpr int64_t sites(int64_t diagonal) const {
    return (diagonal < height ? diagonal + 1 : height) - first_y(diagonal);
  }
  constexpr int64_t rows(int64_t diagonal) const { return sites(diagonal) * batch; }
};

// Where a row of an anti-diagonal stands: its index in [Y * X * B], and its neighbours' or -1.
struct GridPlace {
  int64_t row, above, left, below, right;
};
WEFT_HD GridPlace grid_place(const GridProblem& p, int64_t diagonal, int64_t index) {
  const int64_t y = p.first_y(diagonal) + index / p.batch, x = diagonal - y;
  const int64_t row = (y * p.width + x) * p.batch + index % p.batch;
  const int64_t line = p.width * p.batch;
  return {row, y > 0 ? row - line : -1, x > 0 ? row - p.batch : -1,
          y + 1 < p.height ? row + line : -1, x + 1 < p.width ? row + p.batch : -1};
}

// Contiguous elements; "wide" is the accumulation type.
struct GridForward {
  Numbers sums;       // wide [Y, X, B, 5 * H]: W x
  Numbers bias;       // [5 * H] or null
  Numbers w_above;    // [5 * H, H]
  Numbers w_left;     // [5 * H, H]
  NumbersOut output;  // [Y, X, B, H]
  NumbersOut cells;   // [Y, X, B, H]
  NumbersOut gates;   // [Y, X, B, 5, H]
};

struct GridBackward {
  Numbers grad_output;  // [Y, X, B, H]
  Numbers cells, gates;
  Numbers w_above, w_left;
  NumbersOut grad_sums;   // [Y, X, B, 5 * H]
  NumbersOut grad_cells;  // wide [Y, X, B, H]: work memory
};

struct GridKernels {
  void (*forward)(const GridProblem&, const GridForward&, const Context&);
  void (*backward)(const GridProblem&, const GridBackward&, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(GridKernels, grid_kernels)

// ---- the cell of one unit, in numbers of any kind; M as in rnn_layer_cells.h
// -----------------------

template <class N>
struct GridStep {
  N gates[kGridGates];  // i, a, b, g, o
  N c, h;
};

template <class M, class N = typename M::Number>
WEFT_HD GridStep<N> grid_step(const N (&sums)[kGridGates], N c_above, N c_left) {
  GridStep<N> r = {};
  for (int gate = 0; gate < kGridGates; ++gate)
    r.gates[gate] = gate == 3 ? M::tanh(sums[gate]) : M::sigmoid(sums[gate]);
  r.c = r.gates[1] * c_above + r.gates[2] * c_left + r.gates[0] * r.gates[3];
  r.h = r.gates[4] * M::tanh(r.c);
  return r;
}

template <class N>
struct GridGradient {
  N sums[kGridGates];
  N c;
};

// `grad_c` is what comes from the successors' cells.
template <class M, class N = typename M::Number>
WEFT_HD GridGradient<N> grid_backward(const N (&gates)[kGridGates], N c, N c_above, N c_left,
                                      N grad_h, N grad_c) {
  const N one = M::one(), t = M::tanh(c);
  const N i = gates[0], a = gates[1], b = gates[2], g = gates[3], o = gates[4];
  GridGradient<N> r = {};
  r.c = grad_c + grad_h * o * tanh_slope(t, one);
  r.sums[0] = r.c * g * sigmoid_slope(i, one);
  r.sums[1] = r.c * c_above * sigmoid_slope(a, one);
  r.sums[2] = r.c * c_left * sigmoid_slope(b, one);
  r.sums[3] = r.c * i * tanh_slope(g, one);
  r.sums[4] = grad_h * t * sigmoid_slope(o, one);
  return r;
}

}  // namespace weft
