// A recurrent cell as plain data.
//
// A cell is, per row b of the batch and hidden unit u, some sums and an epilogue. LSTM and GRU have
// four; the columns of those, and of the gates kept for backward, [B, 4, H], are
//   LSTM   i, f, g, o    gates (i, f, o: sigmoid; g: tanh)
//   GRU    r, z, n, q    gates r, z (sigmoid), candidate n = tanh(W_in x + b_in + r * q), and the
//                        hidden state's part of it, q = W_hn h + b_hn
// An Elman cell has one, h' = tanh or relu of it, and keeps h' alone.
// Weights are torch's: LSTM w_ih [4H, I], w_hh [4H, H]; GRU w_ih [3H, I], w_hh [3H, H]; an
// Elman cell's w_ih [H, I], w_hh [H, H].
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace weft {

struct CellProblem {
  DType dtype = DType::f32;
  int64_t batch = 1;   // B
  int64_t input = 1;   // I
  int64_t hidden = 1;  // H

  constexpr int64_t units() const { return batch * hidden; }
};

// All pointers are to elements of `dtype`, contiguous. "or null": absent, which reads as zeros.

struct CellForward {
  const void* x;     // [B, I]
  const void* h;     // [B, H]
  const void* c;     // [B, H]; LSTM only
  const void* w_ih;  // [gates * H, I]
  const void* w_hh;  // [gates * H, H]
  const void* b_ih;  // [gates * H] or null
  const void* b_hh;  // [gates * H] or null
  void* h_next;      // [B, H]
  void* c_next;      // [B, H]; LSTM only
  void* gates;       // [B, 4, H]; LSTM and GRU only; not written if null
};

struct LstmBackward {
  const void* grad_h;  // [B, H] or null
  const void* grad_c;  // [B, H] or null
  const void* gates;   // [B, 4, H]
  const void* c;       // [B, H]
  const void* c_next;  // [B, H]
  void* grad_gates;    // [B, 4, H]: of the gates before their activation
  void* grad_c_prev;   // [B, H]
};

// The gradient of <u_gates, grad_gates> + <u_c, grad_c_prev> of LstmBackward.
struct LstmDoubleBackward {
  const void* u_gates;  // [B, 4, H] or null
  const void* u_c;      // [B, H] or null
  const void* grad_h;   // [B, H] or null
  const void* grad_c;   // [B, H] or null
  const void* gates;    // [B, 4, H]
  const void* c;        // [B, H]
  void* of_grad_h;      // [B, H]
  void* of_grad_c;      // [B, H]
  void* of_gates;       // [B, 4, H]: of the gates before their activation
  void* of_c;           // [B, H]
};

struct GruBackward {
  const void* grad_h;  // [B, H]
  const void* gates;   // [B, 4, H]
  const void* h;       // [B, H]
  void* grad_x_gates;  // [B, 3, H]: of W_ih x + b_ih
  void* grad_h_gates;  // [B, 3, H]: of W_hh h + b_hh
  void* grad_h_prev;   // [B, H]: the part that does not go through the gates
};

// The gradient of <u_x, grad_x_gates> + <u_h, grad_h_gates> + <u_prev, grad_h_prev> of GruBackward.
struct GruDoubleBackward {
  const void* u_x;     // [B, 3, H] or null
  const void* u_h;     // [B, 3, H] or null
  const void* u_prev;  // [B, H] or null
  const void* grad_h;  // [B, H]
  const void* gates;   // [B, 4, H]
  const void* h;       // [B, H]
  void* of_grad_h;     // [B, H]
  void* of_gates;      // [B, 4, H]: of the sums r, z, n, q before activation
  void* of_h;          // [B, H]
};

struct ElmanBackward {
  const void* grad_h;  // [B, H]
  const void* h_next;  // [B, H]
  void* grad_sums;     // [B, H]: of the sums before activation
  bool relu;
};

struct RnnKernels {
  void (*lstm_cell)(const CellProblem&, const CellForward&, const Context&);
  void (*lstm_backward)(const CellProblem&, const LstmBackward&, const Context&);
  void (*lstm_double_backward)(const CellProblem&, const LstmDoubleBackward&, const Context&);
  void (*gru_cell)(const CellProblem&, const CellForward&, const Context&);
  void (*gru_backward)(const CellProblem&, const GruBackward&, const Context&);
  void (*gru_double_backward)(const CellProblem&, const GruDoubleBackward&, const Context&);
  void (*rnn_tanh_cell)(const CellProblem&, const CellForward&, const Context&);
  void (*rnn_relu_cell)(const CellProblem&, const CellForward&, const Context&);
  void (*rnn_backward)(const CellProblem&, const ElmanBackward&, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(RnnKernels, rnn_kernels)

}  // namespace weft
