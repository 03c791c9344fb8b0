// Which convolutions run on Hopper's warpgroup products, and in which tiles: a pure function.
//
// fprop; dgrad, each phase of which (conv_phases.h) is a product of stride 1 over gy with its
// places of the window in reverse and the channels of the weights exchanged; and wgrad, whose tiles
// are output channels by channels of a place, and whose reduction is the walk. All are walks of
// windows over a channels-last map, so that the copies can take the map apart themselves
// (device/hopper.h, WindowBox); what their limits do not allow stays with the plan of
// conv_plan_cuda.h.
#pragma once

#include "conv/conv_plan_cuda.h"
#include "device/hopper_facts.h"

namespace weft {

// A walk: rows of the product are its windows, the reduction their channels and places.
struct ConvWindows {
  int64_t channels = 1;               // of the map
  int64_t columns = 1;                // of the product
  int64_t map[3] = {1, 1, 1};         // D, H, W of the map ...
  int64_t rows[3] = {1, 1, 1};        // ... and of the windows
  int64_t lower[3] = {};              // the base of the first window
  int64_t upper[3] = {};              // of the last one, from the end of the map
  int64_t stride[3] = {1, 1, 1};      // on the map, from a window to the next
  int64_t places[3] = {1, 1, 1};      // of a window
  int64_t place_step[3] = {1, 1, 1};  // on the map, from a place to the next
  int64_t weight_place = 0;           // of the weights at the first place, as a flat index ...
  int64_t weight_step[3] = {};        // ... and on to the next

  constexpr int64_t all_rows() const { return rows[0] * rows[1] * rows[2]; }

  // Whether copies of a map of this rank can walk so.
  constexpr bool fit(int rank) const {
    const int64_t most = device::window_box_limit(rank);
    for (int a = 5 - rank; a < 3; ++a)
      if (lower[a] < -most || lower[a] >= most || upper[a] < -most || upper[a] >= most ||
          (places[a] - 1) * place_step[a] >= 2 * most || stride[a] > device::kMostWindowStride)
        return false;
    return true;
  }
};

struct ConvWgmmaPlan {
  bool fits = false;
  int rank = 4;          // of the map: 2 + the axes that are walked over
  int columns = 64;      // of a tile
  int64_t launches = 1;  // of dgrad, for its phases
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

// Steps of the flat index of a place along the axes of the window.
constexpr int64_t weight_step(const ConvProblem& p, int axis) {
  return (axis < 1 ? p.window[1].size : 1) * (axis < 2 ? p.window[2].size : 1);
}

// Of fprop and wgrad, over x.
constexpr ConvWindows conv_windows(const ConvProblem& p) {
  ConvWindows windows;
  windows.channels = p.c;
  windows.columns = p.k;
  for (int a = 0; a < 3; ++a) {
    const Window& w = p.window[a];
    windows.map[a] = p.in[a];
    windows.rows[a] = p.out[a];
    windows.lower[a] = -w.padding;
    windows.upper[a] = windows.lower[a] + (p.out[a] - 1) * w.stride - (p.in[a] - 1);
    windows.stride[a] = w.stride;
    windows.places[a] = w.size;
    windows.place_step[a] = w.dilation;
    windows.weight_step[a] = weight_step(p, a);
  }
  return windows;
}

// Of one phase of dgrad, over gy: its last place, which reads the first output, comes first.
constexpr ConvWindows phase_windows(const ConvProblem& p, const int64_t (&remainder)[3]) {
  ConvWindows windows;
  windows.channels = p.k;
  windows.columns = p.c;
  for (int a = 0; a < 3; ++a) {
    const conv_plan::Phase phase = conv_plan::phase_of(p.window[a], p.in[a], remainder[a]);
    const int64_t last = std::max<int64_t>(phase.places - 1, 0);
    windows.map[a] = p.out[a];
    windows.rows[a] = phase.inputs;
    windows.lower[a] = phase.first_output + last * phase.output_step;
    windows.upper[a] = windows.lower[a] + (phase.inputs - 1) - (p.out[a] - 1);
    windows.places[a] = phase.places;
    windows.place_step[a] = -phase.output_step;
    windows.weight_place += (phase.first_place + last * phase.place_step) * weight_step(p, a);
    windows.weight_step[a] = -phase.place_step * weight_step(p, a);
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
  const auto still = [&](int a) {  // with padding, the only window may lie outside
    return p.in[a] == 1 && p.out[a] == 1 && p.window[a].size == 1 && p.window[a].padding == 0;
  };
  plan.rank = !still(0) ? 5 : !still(1) ? 4 : 3;
  if (step == ConvProduct::dgrad) {
    plan.fits = true;
    int64_t phases = 0;
    conv_plan::for_phases(p, [&](const int64_t (&remainder)[3], int64_t rows) {
      plan.fits = plan.fits && phase_windows(p, remainder).fit(plan.rank);
      plan.tiles_m += ceil_div(rows, kRows);
      ++phases;
    });
    plan.launches = ceil_div(phases, int64_t{conv_plan::kMostPhases});
  } else {
    plan.fits = conv_windows(p).fit(plan.rank);
    plan.tiles_m = ceil_div(p.n * p.out_positions(), kRows);
  }
  if (!plan.fits) return plan;
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
  // The widest tile that is no emptier than narrow ones and leaves no multiprocessor idle.
  const int64_t columns = step == ConvProduct::dgrad ? p.c : p.k;
  const int64_t narrow = ceil_div(columns, 64) * 64;
  for (int width : kWidths) {
    plan.columns = width;
    plan.tiles_n = ceil_div(columns, width);
    if (plan.tiles_n * width == narrow && plan.tiles_m * plan.tiles_n >= facts.multiprocessors)
      break;
  }
  return plan;
}

}  // namespace weft
