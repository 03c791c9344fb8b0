// Which convolutions run on Hopper's warpgroup products, and in which tiles: a pure function.
//
// fprop, and dgrad of stride 1, which is fprop over gy with the places of the window in reverse and
// the channels of the weights exchanged; and wgrad, whose tiles are output channels by channels of
// a place, and whose reduction is the walk. All are a walk of windows over a channels-last map, so
// that the copies can take the map apart themselves (device/hopper.h, WindowBox); what their limits
// do not allow stays with the plan of conv_plan_cuda.h.
#pragma once

#include "conv/conv_plan_cuda.h"
#include "device/hopper_facts.h"

namespace weft {

// The walk: rows of the product are its windows, the reduction their channels and places.
struct ConvWindows {
  int64_t channels = 1;         // of the map
  int64_t columns = 1;          // of the product
  int64_t map[3] = {1, 1, 1};   // D, H, W of the map ...
  int64_t rows[3] = {1, 1, 1};  // ... and of the windows
  int64_t lower[3] = {};        // the base of the first window
  int64_t upper[3] = {};        // of the last one, from the end of the map
  bool reversed = false;        // the places of the weights
};

struct ConvWgmmaPlan {
  bool fits = false;
  ConvWindows windows;
  int rank = 4;      // of the map: 2 + the axes that are walked over
  int columns = 64;  // of a tile
  int64_t tiles_m = 0, tiles_n = 0;
  int64_t splits = 1;       // of the walk of wgrad, added in a second launch
  int64_t split_steps = 0;  // of kDepth windows, in each

  constexpr int64_t blocks() const { return tiles_m * tiles_n * splits; }
};

namespace conv_wgmma {
constexpr int kRows = 128;  // of a tile: two warpgroups
constexpr int kDepth = 64;  // of a step: 128 bytes of channels
constexpr int kStages = 4;
constexpr int kWidths[] = {256, 192, 128, 64};
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 288;  // and a warp that copies
static_assert(kThreads == 32 * (kConsumerWarps + 1));

// Of a ring of stages with tiles of `columns`, its barriers, and what its alignment may cost.
constexpr int64_t shared_bytes(int columns) {
  return int64_t{kStages} * (kRows + columns) * device::kBoxRowBytes + 2 * 8 * kStages +
         device::kBoxAlignment;
}
}  // namespace conv_wgmma

inline ConvWindows conv_windows(const ConvProblem& p, ConvProduct step) {
  ConvWindows windows;
  windows.reversed = step == ConvProduct::dgrad;
  windows.channels = windows.reversed ? p.k : p.c;
  windows.columns = windows.reversed ? p.c : p.k;
  for (int a = 0; a < 3; ++a) {
    const Window& w = p.window[a];
    windows.map[a] = windows.reversed ? p.out[a] : p.in[a];
    windows.rows[a] = windows.reversed ? p.in[a] : p.out[a];
    windows.lower[a] = windows.reversed ? w.padding - (w.span() - 1) : -w.padding;
    windows.upper[a] = windows.lower[a] + (windows.rows[a] - 1) * w.stride - (windows.map[a] - 1);
  }
  return windows;
}

inline ConvWgmmaPlan plan_conv_wgmma(const ConvProblem& p, ConvProduct step, bool aligned = true,
                                     const ConvCudaFacts& facts = {}) {
  using namespace conv_wgmma;
  ConvWgmmaPlan plan;
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  const bool cheap = p.activation != Activation::tanh && p.activation != Activation::sigmoid;
  if (!half || !cheap || !aligned || !p.channels_last || p.groups != 1 || p.c % 8 != 0 ||
      p.k % 8 != 0)
    return plan;
  const ConvCudaPlan product = plan_conv_cuda(p, step, aligned, facts);
  if (product.path != ConvCudaPlan::Path::product) return plan;
  const ConvWindows windows = plan.windows = conv_windows(p, step);
  const auto still = [&](int a) {
    return windows.map[a] == 1 && windows.rows[a] == 1 && p.window[a].size == 1;
  };
  plan.rank = !still(0) ? 5 : !still(1) ? 4 : 3;
  const int64_t most = device::window_box_limit(plan.rank);
  for (int a = 0; a < 3; ++a) {
    const Window& w = p.window[a];
    if (a < 5 - plan.rank) continue;
    if (windows.lower[a] < -most || windows.lower[a] >= most || windows.upper[a] < -most ||
        windows.upper[a] >= most || w.span() > 2 * most || w.stride > device::kMostWindowStride ||
        (windows.reversed && w.stride != 1))
      return plan;
  }
  plan.fits = true;
  if (step == ConvProduct::wgrad) {
    // The widest tile that is no emptier than narrow ones; as many splits as keep the device busy.
    const int64_t narrow = ceil_div(p.c, 64) * 64;
    for (int width : kWidths) {
      plan.columns = width;
      if (ceil_div(p.c, width) * width == narrow) break;
    }
    plan.tiles_m = ceil_div(p.k, kRows);
    plan.tiles_n = p.window_elements() * ceil_div(p.c, plan.columns);
    const int64_t steps = ceil_div(p.n * p.out_positions(), kDepth);
    // The workspace is that of the plan without Hopper's words.
    const int64_t splits =
        std::clamp<int64_t>(2 * facts.multiprocessors / (plan.tiles_m * plan.tiles_n), 1,
                            std::min(product.splits, std::max<int64_t>(steps / 8, 1)));
    plan.split_steps = ceil_div(steps, splits);
    plan.splits = ceil_div(steps, plan.split_steps);
    return plan;
  }
  plan.tiles_m = ceil_div(p.n * windows.rows[0] * windows.rows[1] * windows.rows[2], kRows);
  // The widest tile that is no emptier than narrow ones and leaves no multiprocessor idle.
  const int64_t narrow = ceil_div(windows.columns, 64) * 64;
  for (int width : kWidths) {
    plan.columns = width;
    plan.tiles_n = ceil_div(windows.columns, width);
    if (plan.tiles_n * width == narrow && plan.tiles_m * plan.tiles_n >= facts.multiprocessors)
      break;
  }
  return plan;
}

}  // namespace weft
