// One direction of one recurrent layer over a whole sequence, as plain data.
//
// The steps are those of the cells in rnn.h; the input's products W_ih x of all steps are made
// before. `lengths` [B] (or null) says how many steps each row has: beyond them its output is zero
// and its state stays as it was. A reversed layer begins at step T - 1, so a row's state stays the
// initial one down to its own last step.
//
// Sums of the input's product: LSTM i, f, g, o; GRU r, z, n; Elman one. Kept gates [T, B, 4, H] as
// in rnn.h; an Elman layer keeps its output alone.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

enum class LayerCell : uint8_t { lstm, gru, tanh, relu };

struct LayerProblem {
  DType dtype = DType::f32;
  LayerCell cell = LayerCell::lstm;
  int64_t steps = 0;   // T
  int64_t batch = 0;   // B
  int64_t hidden = 1;  // H
  bool reverse = false;

  constexpr int64_t gates() const {
    return cell == LayerCell::lstm ? 4 : cell == LayerCell::gru ? 3 : 1;
  }
  constexpr int64_t units() const { return batch * hidden; }
  // The time of the s-th step.
  WEFT_HD constexpr int64_t time(int64_t s) const { return reverse ? steps - 1 - s : s; }
};

// Pointers are to contiguous elements of `dtype` unless said otherwise; "wide" is the accumulation
// type of `dtype`.

struct LayerForward {
  const void* h0;    // [B, H]
  const void* c0;    // [B, H]; LSTM only
  const void* w_hh;  // [gates * H, H]
  const void* b_ih;  // [gates * H] or null
  const void* b_hh;  // [gates * H] or null
  const int64_t* lengths;
  const void* sums;   // wide [T, B, ...]: W_ih x; may be the memory of `gates`
  int64_t sums_row;   // elements from one row of sums to the next
  void* output;       // [T, B, H]
  void* h_n;          // [B, H]
  void* c_n;          // [B, H]; LSTM only
  void* cells;        // [T, B, H]; LSTM only; not written if null
  void* gates;        // [T, B, 4, H]; LSTM and GRU only; not written if null
  void* states;       // [2, B, H]; work memory of CUDA targets
  void* cell_states;  // [2, B, H]; the same, LSTM only
};

struct LayerBackward {
  const void* grad_output;  // [T, B, H] or null
  const void* gates;        // [T, B, 4, H]; LSTM and GRU
  const void* cells;        // [T, B, H]; LSTM
  const void* c0;           // [B, H]; LSTM
  const void* h_before;     // [T, B, H], the state before each step; GRU
  const void* output;       // [T, B, H]; Elman
  const void* w_hh;         // [gates * H, H]
  const int64_t* lengths;
  void* grad_sums;         // [T, B, gates * H]: of W_ih x + b_ih
  void* grad_hidden_sums;  // the same of W_hh h + b_hh; GRU only, elsewhere they are equal
  void* grad_h;            // wide [B, H]: in, of the last state; out, of the first
  void* grad_c;            // the same of c; LSTM only
  void* direct;            // wide [B, H]; work memory of CUDA targets
};

struct LayerKernels {
  void (*forward)(const LayerProblem&, const LayerForward&, const Context&);
  void (*backward)(const LayerProblem&, const LayerBackward&, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(LayerKernels, layer_kernels)

}  // namespace weft
