// One direction of one recurrent layer over a whole sequence, as plain data.
//
// The input's products W_ih x of all steps are made before; a step is then the hidden state's
// product and a cell of rnn_layer_cells.h. Which steps a row takes:
//   `lengths` [B]     beyond its length a row's output is zero and its state stays as it was. A
//                     reversed layer begins at step T - 1, so a row's state stays the initial one
//                     down to its own last step.
//   `resets` [T, B]   where true, the step starts from zeros, and no gradient passes it.
//   `dropout` [B, S]  multiplies the state as the product with W_hh sees it, the same at all steps.
//   zoneout           a state z of old and 1 - z of new: z is 0 or 1 from `zone_h`, `zone_c`
//                     [T, B, S], [T, B, H], or where those are null the problem's `zoneout` itself.
//
//
// Layer normalisation (Ba et al. 2016) is of W_ih x and of W_hh h, each gate's block of H sums on
// its own: scale * (s - mean) / sqrt(variance + eps), to which the bias is added.
//
// Everything may be run on dual numbers (cell_math.h): each tensor then comes with its derivative.
// The gradient of <u, backward(g)> is found so: forward in the direction u gives the part of g, and
// backward of those dual numbers the parts of everything else.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

constexpr double kNormEpsilon = 1e-5;  // as torch.nn.LayerNorm

enum class LayerCell : uint8_t {
  lstm,
  lstm_peephole,           // the output gate sees the new cell
  lstm_peephole_previous,  // all gates see the old one
  lstm_coupled,
  gru,
  gru_reset_before,
  tanh,
  relu
};

struct LayerProblem {
  DType dtype = DType::f32;
  LayerCell cell = LayerCell::lstm;
  int64_t steps = 0;       // T
  int64_t batch = 0;       // B
  int64_t hidden = 1;      // H
  int64_t projection = 0;  // P; zero: none
  bool reverse = false;
  double zoneout = 0;
  bool dual = false;  // float32 and float64 only

  constexpr bool has_cell() const { return cell <= LayerCell::lstm_coupled; }
  constexpr bool has_peephole() const {
    return cell == LayerCell::lstm_peephole || cell == LayerCell::lstm_peephole_previous;
  }
  WEFT_HD constexpr bool is_gru() const {
    return cell == LayerCell::gru || cell == LayerCell::gru_reset_before;
  }
  // A second product within a step: U_n (r h), or the projection.
  constexpr bool has_inner() const { return projection > 0 || cell == LayerCell::gru_reset_before; }
  WEFT_HD constexpr bool is_elman() const { return cell >= LayerCell::tanh; }
  // Rows of W_hh for one unit: the sums of a step.
  WEFT_HD constexpr int64_t gates() const {
    if (is_elman()) return 1;
    return is_gru() || cell == LayerCell::lstm_coupled ? 3 : 4;
  }
  // What a step keeps of one unit for backward.
  constexpr int64_t kept() const { return cell == LayerCell::gru ? 4 : gates(); }
  constexpr int64_t units() const { return batch * hidden; }
  // The size of h, S: P where there is a projection, else H.
  WEFT_HD constexpr int64_t state() const { return projection > 0 ? projection : hidden; }
  constexpr int64_t states() const { return batch * state(); }
  // The time of the s-th step.
  WEFT_HD constexpr int64_t time(int64_t s) const { return reverse ? steps - 1 - s : s; }
};

// Contiguous elements of the problem's dtype, unless said otherwise, and their derivatives where
// the problem is dual; "wide" is the accumulation type. A null derivative reads as zeros.
struct Numbers {
  const void* value = nullptr;
  const void* derivative = nullptr;
};
struct NumbersOut {
  void* value = nullptr;
  void* derivative = nullptr;

  operator Numbers() const { return {value, derivative}; }
};

// Which steps are taken, and what of the state passes from one to the next; all may be null.
struct LayerMasks {
  const int64_t* lengths = nullptr;  // [B]
  const bool* resets = nullptr;      // [T, B]
  const void* dropout = nullptr;     // [B, S]
  const void* zone_h = nullptr;      // [T, B, S]
  const void* zone_c = nullptr;      // [T, B, H]
};

struct LayerForward {
  Numbers h0;        // [B, S]
  Numbers c0;        // [B, H]; cells with c only
  Numbers w_hh;      // [gates * H, S]
  Numbers w_hr;      // [P, H]; with a projection only
  Numbers b_ih;      // [gates * H] or null
  Numbers b_hh;      // [gates * H] or null
  Numbers peephole;  // [3 * H]
  Numbers norm;      // [gates * H]: scale of W_hh h; null: not normalised
  LayerMasks masks;
  // wide [T, B, ...]: W_ih x, normalised if `norm` is given, on CPU targets by the kernel, from
  // input_products; may be the memory of `gates`.
  NumbersOut sums;
  int64_t sums_row = 0;      // elements from one row of sums to the next
  Numbers input_norm;        // [gates * H]: scale of W_ih x; CPU targets only, as the two below
  Numbers input_products;    // wide [T, B, gates * H]: W_ih x before; may be `sums`
  NumbersOut kept_products;  // [T, B, gates * H]: a copy of those; not written if null
  NumbersOut output;         // [T, B, S]
  NumbersOut h_n;            // [B, S]
  NumbersOut c_n;            // [B, H]; cells with c only
  NumbersOut cells;          // [T, B, H]; cells with c only; not written if null
  NumbersOut gates;          // [T, B, kept, H]; not written if null
  NumbersOut products;       // [T, B, gates * H]: W_hh h before normalisation; not written if null
  NumbersOut step;           // wide [2, B, gates * H]; work memory of CUDA targets, if normalised
  NumbersOut states;         // [2, B, S]; work memory of CUDA targets
  NumbersOut cell_states;    // [2, B, H]; the same, cells with c only
  NumbersOut inner;          // [2, B, H]; the same, with an inner product only
  void* flags = nullptr;     // int32 [kSequenceFlags]; work memory of CUDA targets
};

struct LayerBackward {
  Numbers grad_output;  // [T, B, S] or null
  Numbers gates;        // [T, B, kept, H]
  Numbers cells;        // [T, B, H]; cells with c only
  Numbers c0;           // [B, H]; cells with c only
  Numbers h_before;     // [T, B, H], the state before each step; both GRU
  Numbers w_hh;         // [gates * H, S]
  Numbers w_hr;         // [P, H]; with a projection only
  Numbers peephole;     // [3 * H]
  Numbers norm;         // [gates * H]; null: not normalised
  Numbers products;     // [T, B, gates * H]; if normalised
  LayerMasks masks;
  NumbersOut grad_sums;         // [T, B, gates * H]: of W_ih x + b_ih, normalised
  NumbersOut grad_hidden_sums;  // the same of W_hh h + b_hh; GRU only, elsewhere they are equal
  NumbersOut grad_products;     // the same of W_hh h before normalisation
  // What is added to the gradient of `norm`: by each row, [T, B, gates * H]; on CPU targets
  // wide [B, gates * H]: in, zeros; out, the sum over the steps.
  NumbersOut grad_norm;
  // On CPU targets the same of W_ih x: its scale, its products, the gradients of both.
  Numbers input_norm, input_products;
  NumbersOut grad_input_products, grad_input_norm;
  NumbersOut grad_h;          // wide [B, S]: in, of the last state; out, of the first
  NumbersOut grad_c;          // the same of c, [B, H]; cells with c only
  NumbersOut grad_peephole;   // wide [B, 3, H]: in, zeros; out, the sum over the steps
  NumbersOut grad_projected;  // [T, B, P]: of W_hr's product; with a projection only
  NumbersOut unprojected;     // [T, B, H]: its other factor, o tanh(c)
  NumbersOut direct;          // wide [B, S]; work memory of CUDA targets
  NumbersOut inner;           // wide [B, H]; the same, with an inner product only
  NumbersOut partial;         // wide [4, B, gates * H]; the same, if normalised
  void* flags = nullptr;      // int32 [kSequenceFlags]; the same
};

// Rows of `gates` blocks of H numbers; of each row the blocks [first, end).
struct NormForward {
  int64_t rows = 0, first = 0, end = 0;
  Numbers products;             // wide [rows, gates * H]
  Numbers scale;                // [gates * H]
  const bool* fresh = nullptr;  // [rows]: where true, products read as zeros; may be null
  NumbersOut kept;              // [rows, gates * H]: a copy of products; not written if null
  NumbersOut out;               // wide, rows `out_row` apart; may be the memory of products
  int64_t out_row = 0;
};

// All [rows, gates * H].
struct NormBackward {
  int64_t rows = 0, first = 0, end = 0;
  Numbers grad;  // of what was normalised
  Numbers products;
  Numbers scale;  // [gates * H]
  NumbersOut grad_products;
  NumbersOut grad_scale;  // what each row adds to the gradient of `scale`
};

struct LayerKernels {
  void (*forward)(const LayerProblem&, const LayerForward&, const Context&);
  void (*backward)(const LayerProblem&, const LayerBackward&, const Context&);
  // Null on CPU targets.
  void (*normalise)(const LayerProblem&, const NormForward&, const Context&);
  void (*normalise_backward)(const LayerProblem&, const NormBackward&, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(LayerKernels, layer_kernels)

}  // namespace weft
