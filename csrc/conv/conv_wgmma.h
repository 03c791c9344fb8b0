// What the convolutions on Hopper's words share: the ring of stages and the walk of windows.
#pragma once

#include "conv/conv_cuda.h"
#include "conv/conv_wgmma_plan.h"
#include "device/hopper.h"

namespace weft::WEFT_TARGET {
namespace {

using conv_wgmma::kConsumerWarps;
using conv_wgmma::kDepth;
using conv_wgmma::kRows;
using conv_wgmma::kStages;
using conv_wgmma::kThreads;
using device::MBarrier;
using device::TensorMap;

constexpr int kGroupRows = 64;  // of a warpgroup

// The walk of windows, with axes W, H, D as copies order them.
struct Walk {
  int rank;
  int rows[3];
  int first[3];
  int stride[3];
  int dilation[3];
  int places[3];
  int channel_steps;
  bool reversed;
  int columns;
  int tiles_n;
  int64_t total_rows;

  WEFT_HD int all_places() const { return places[0] * places[1] * places[2]; }
  WEFT_HD int steps() const { return all_places() * channel_steps; }
};

// Stages of a tile of kRows by kColumns.
template <class T, int kColumns>
struct Ring {
  static constexpr int kElementsA = kRows * kDepth;
  static constexpr int kElementsB = kColumns * kDepth;
  static constexpr int kStageBytes = (kElementsA + kElementsB) * 2;
  static_assert(kElementsA * 2 % device::kBoxAlignment == 0 && kColumns % 64 == 0);

  T* tiles;
  MBarrier* full;   // a stage's bytes have landed
  MBarrier* empty;  // all consumers are done with it

  WEFT_DEVICE T* a(int stage) const { return tiles + stage * (kElementsA + kElementsB); }
  WEFT_DEVICE T* b(int stage) const { return a(stage) + kElementsA; }

  WEFT_DEVICE Ring() {
    device::SharedMemory memory;
    tiles = memory.take<T, device::kBoxAlignment>(kStages * (kElementsA + kElementsB));
    full = memory.take<MBarrier>(kStages);
    empty = memory.take<MBarrier>(kStages);
    if (device::thread_index() == 0)
      for (int i = 0; i < kStages; ++i) {
        full[i].init(1);
        empty[i].init(kConsumerWarps);
      }
    device::barrier();
  }
};

WEFT_DEVICE void copy_windows(int rank, void* to, const TensorMap& map, MBarrier& landed,
                              const device::WindowAt& at) {
  if (rank == 3)
    device::tma_load_im2col<3>(to, map, landed, at);
  else if (rank == 4)
    device::tma_load_im2col<4>(to, map, landed, at);
  else
    device::tma_load_im2col<5>(to, map, landed, at);
}

// Where the walk begins with window `row`: its base and image.
WEFT_DEVICE device::WindowAt window_at(const Walk& walk, int64_t row) {
  device::WindowAt at;
  for (int a = 0; a < 3; ++a) {
    at.base[a] = walk.first[a] + static_cast<int>(row % walk.rows[a]) * walk.stride[a];
    row /= walk.rows[a];
  }
  at.image = static_cast<int>(row);
  return at;
}

// At place `place` of each window.
WEFT_DEVICE void set_place(const Walk& walk, int place, device::WindowAt& at) {
  at.offset[0] = place % walk.places[0] * walk.dilation[0];
  at.offset[1] = place / walk.places[0] % walk.places[1] * walk.dilation[1];
  at.offset[2] = place / walk.places[0] / walk.places[1] * walk.dilation[2];
}

inline Walk walk_of(const ConvProblem& p, const ConvWgmmaPlan& plan) {
  Walk walk{};
  walk.rank = plan.rank;
  walk.total_rows = p.n;
  for (int a = 0; a < 3; ++a) {
    walk.rows[a] = static_cast<int>(plan.windows.rows[2 - a]);
    walk.first[a] = static_cast<int>(plan.windows.lower[2 - a]);
    walk.stride[a] = static_cast<int>(p.window[2 - a].stride);
    walk.dilation[a] = static_cast<int>(p.window[2 - a].dilation);
    walk.places[a] = static_cast<int>(p.window[2 - a].size);
    walk.total_rows *= walk.rows[a];
  }
  walk.channel_steps = static_cast<int>(ceil_div(plan.windows.channels, kDepth));
  walk.reversed = plan.windows.reversed;
  walk.columns = static_cast<int>(plan.windows.columns);
  walk.tiles_n = static_cast<int>(plan.tiles_n);
  return walk;
}

// The map as [n, (d, (h,)) w, channels], copied in boxes of so many windows.
inline TensorMap windows_of(const ConvProblem& p, const ConvWgmmaPlan& plan, int windows,
                            const void* map) {
  const int axes = plan.rank - 2;
  device::TensorView view{map, p.dtype, plan.rank, {plan.windows.channels}, {1}};
  device::WindowBox box;
  box.channels = kDepth;
  box.pixels = windows;
  int64_t step = plan.windows.channels;
  for (int a = 0; a < axes; ++a) {
    view.extent[a + 1] = plan.windows.map[2 - a];
    view.step[a + 1] = step;
    step *= plan.windows.map[2 - a];
    box.lower[a] = static_cast<int>(plan.windows.lower[2 - a]);
    box.upper[a] = static_cast<int>(plan.windows.upper[2 - a]);
    box.stride[a] = static_cast<int>(p.window[2 - a].stride);
  }
  view.extent[axes + 1] = p.n;
  view.step[axes + 1] = step;
  return device::tensor_map(view, box);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
