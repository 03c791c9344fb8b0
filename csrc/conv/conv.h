// Convolution as plain data.
//
// Cross-correlation, y[n,k,o] = bias[k] + Σ_{c,r} x[n, c, o·stride − padding + r·dilation]
// w[k,c,r], with positions o and window places r of three axes; 1-d and 2-d problems have unit axes
// in front. `padding` in a window is the leading one only: how far a window runs past the end
// follows from the output's extent, so that padding may be asymmetric. A transposed convolution is
// a dgrad, with a bias for each channel of x.
//
// Extents and layouts, contiguous | channels-last (G groups, C and K channels of one group):
//   x, gx [N, G·C, D, H, W]   | [N, D, H, W, G·C]
//   w, gw [G·K, C, T, R, S]   | [G·K, T, R, S, C]
//   y, gy [N, G·K, D, H, W]   | [N, D, H, W, G·K]
//   bias, gb [G·K]
#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"
#include "core/window.h"

namespace weft {

// What follows the sum and the bias of an output.
enum class Activation : uint8_t { none, relu, leaky_relu, tanh, sigmoid };

struct ConvProblem {
  DType dtype = DType::f32;
  bool channels_last = false;
  bool tf32 = false;  // CUDA: float32 products may be rounded to TF32
  int64_t n = 1;
  int64_t groups = 1;
  int64_t c = 1;               // input channels of one group
  int64_t k = 1;               // output channels of one group
  int64_t in[3] = {1, 1, 1};   // D, H, W of the input
  int64_t out[3] = {1, 1, 1};  // of the output
  Window window[3];
  Activation activation = Activation::none;  // of fprop
  double slope = 0;                          // of leaky_relu, for negative values
  bool direct = false;  // CPU: a part of a larger problem that goes place by place, and so must it

  WEFT_HD constexpr int64_t in_positions() const { return in[0] * in[1] * in[2]; }
  WEFT_HD constexpr int64_t out_positions() const { return out[0] * out[1] * out[2]; }
  WEFT_HD constexpr int64_t window_elements() const {
    return window[0].size * window[1].size * window[2].size;
  }
  WEFT_HD constexpr int64_t in_channels() const { return groups * c; }
  WEFT_HD constexpr int64_t out_channels() const { return groups * k; }
  WEFT_HD constexpr int64_t in_elements() const { return n * in_channels() * in_positions(); }
  WEFT_HD constexpr int64_t out_elements() const { return n * out_channels() * out_positions(); }
  WEFT_HD constexpr int64_t weight_elements() const {
    return out_channels() * c * window_elements();
  }
};

// The gradient of contiguous maps, made where a kernel asks for it, so that it lies in the cache
// and never in memory.
struct MadeGradient {
  // to [count, out positions] = that of `count` planes from `first` on, as far as `slices` and
  // `rows` of each; other places of `to` may be written too.
  void (*make)(const MadeGradient&, int64_t first, int64_t count, Range slices, Range rows,
               void* to);
};

// What all gradients of y = activation(x ⋆ w + bias) are computed from, and where they go.
struct ConvGradients {
  const void* x;
  const void* gy;
  const void* w;
  const void* y;  // null without an activation
  void* gx;
  void* gw;
  void* gb;  // may be null
  // Where there is one, gy and y are null; of contiguous depthwise problems.
  const MadeGradient* made = nullptr;
};

// Pointers are to elements of `dtype`. fprop, dgrad and wgrad are closed under differentiation:
// each is linear in both its arguments, and the derivative by either is another of the three.
struct ConvKernels {
  // y = activation(x ⋆ w + bias); bias may be null. The sum is rounded to the dtype first.
  void (*fprop)(const ConvProblem&, const void* x, const void* w, const void* bias, void* y,
                const Context&);
  // gx = for each input the sum of gy · w over the windows that hold it, and its bias [G·C], which
  // may be null.
  void (*dgrad)(const ConvProblem&, const void* gy, const void* w, const void* bias, void* gx,
                const Context&);
  // gw = for each weight the sum of x · gy over images and positions.
  void (*wgrad)(const ConvProblem&, const void* x, const void* gy, void* gw, const Context&);
  // gb = sum of gy over images and positions.
  void (*bias_grad)(const ConvProblem&, const void* gy, void* gb, const Context&);
  // Bytes of Context::workspace that wgrad takes; null: none.
  int64_t (*wgrad_workspace)(const ConvProblem&) = nullptr;
  // dgrad, wgrad and bias_grad in one walk, the activation undone; null: one by one. Asked for
  // where conv_fuses_backward (conv_plan.h) says so.
  void (*backward)(const ConvProblem&, const ConvGradients&, const Context&) = nullptr;
  // undone = gy with the activation of y undone; and gb, which may be null, of that. Null: torch's.
  void (*undo)(const ConvProblem&, const void* gy, const void* y, void* undone, void* gb,
               const Context&) = nullptr;
};

WEFT_DECLARE_KERNEL_TABLES(ConvKernels, conv_kernels)

}  // namespace weft
