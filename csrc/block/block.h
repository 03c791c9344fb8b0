// A CNN's layer, convolution, activation and pooling, as plain data.
//
// What training keeps of the unpooled map is the places of its maxima or, of averages after relu
// and leaky relu, its signs: the bit of an element tells whether the activation's gradient is 1
// there.
#pragma once

#include "conv/conv.h"
#include "pool/pool.h"

namespace weft {

struct BlockProblem {
  ConvProblem conv;
  PoolProblem pool;  // of the convolution's output
  bool maximum = true;
};

// Rows of a map that lie one after another, each with its own bytes: planes of a contiguous map, W
// × channels of a channels-last one.
struct SignRows {
  DType dtype = DType::f32;
  Activation activation = Activation::relu;  // or leaky_relu
  double slope = 0;
  int64_t rows = 0;
  int64_t length = 0;  // elements of a row

  constexpr int64_t bytes() const { return (length + 7) / 8; }  // of a row
};

WEFT_HD constexpr bool block_has_signs(Activation activation) {
  return activation == Activation::relu || activation == Activation::leaky_relu;
}

// Rows of signs of a map, of the output of a convolution.
WEFT_HD SignRows sign_rows(const PoolProblem& pool, bool channels_last, Activation activation,
                           double slope) {
  const int64_t length = channels_last ? pool.in[2] * pool.inner : pool.in_positions();
  return {pool.dtype, activation, slope, pool.in_elements() / (length > 0 ? length : 1), length};
}

// What all gradients of a layer are computed from, and where they go.
struct BlockGradients {
  const void* x;
  const void* gy;  // as y
  const void* w;
  const void* y;        // pooled; of maxima
  const uint8_t* kept;  // places of maxima, or signs
  void* gx;
  void* gw;
  void* gb;  // may be null
};

struct BlockKernels {
  // signs [rows, bytes()] of y [rows, length].
  void (*keep_signs)(const SignRows&, const void* y, uint8_t* signs, const Context&);
  // grad [rows, length] times the activation's gradient, in place.
  void (*pass_signs)(const SignRows&, const uint8_t* signs, void* grad, const Context&);
  // The gradients, without the map's in memory. Null: one by one. Asked for where
  // block_fuses_backward (block_plan.h) says so.
  void (*backward)(const BlockProblem&, const BlockGradients&, const Context&) = nullptr;
};

WEFT_DECLARE_KERNEL_TABLES(BlockKernels, block_kernels)

}  // namespace weft
