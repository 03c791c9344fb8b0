// Signs of an activated map as plain data: the bit of an element tells whether the activation's
// gradient is 1 there, which is all that backward needs of a map that relu or leaky relu made.
#pragma once

#include "conv/conv.h"

namespace weft {

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

struct BlockKernels {
  // signs [rows, bytes()] of y [rows, length].
  void (*keep_signs)(const SignRows&, const void* y, uint8_t* signs, const Context&);
  // grad [rows, length] times the activation's gradient, in place.
  void (*pass_signs)(const SignRows&, const uint8_t* signs, void* grad, const Context&);
};

WEFT_DECLARE_KERNEL_TABLES(BlockKernels, block_kernels)

}  // namespace weft
