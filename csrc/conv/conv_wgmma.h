// What the convolutions on Hopper's words share: the ring of stages, the walk of windows, and how
// both are set up.
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

// The walk of windows (ConvWindows), with axes W, H, D as copies order them.
struct Walk {
  int rank;
  int rows[3];
  int first[3];
  int stride[3];
  int places[3];
  int place_step[3];
  int weight_place;
  int weight_step[3];
  int channel_steps;
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

// At place `place` of each window; returns that of the weights.
WEFT_DEVICE int set_place(const Walk& walk, int place, device::WindowAt& at) {
  int weight_place = walk.weight_place;
  for (int a = 0; a < 3; ++a) {
    const int i = place % walk.places[a];
    place /= walk.places[a];
    at.offset[a] = i * walk.place_step[a];
    weight_place += i * walk.weight_step[a];
  }
  return weight_place;
}

// ---- on the host -----------------------------------------------------------------------------

inline Walk walk_of(const ConvProblem& p, const ConvWgmmaPlan& plan, const ConvWindows& windows) {
  Walk walk{};
  walk.rank = plan.rank;
  for (int a = 0; a < 3; ++a) {
    walk.rows[a] = static_cast<int>(windows.rows[2 - a]);
    walk.first[a] = static_cast<int>(windows.lower[2 - a]);
    walk.stride[a] = static_cast<int>(windows.stride[2 - a]);
    walk.places[a] = static_cast<int>(windows.places[2 - a]);
    walk.place_step[a] = static_cast<int>(windows.place_step[2 - a]);
    walk.weight_step[a] = static_cast<int>(windows.weight_step[2 - a]);
  }
  walk.weight_place = static_cast<int>(windows.weight_place);
  walk.channel_steps = static_cast<int>(ceil_div(windows.channels, kDepth));
  walk.columns = static_cast<int>(windows.columns);
  walk.tiles_n = static_cast<int>(plan.tiles_n);
  walk.total_rows = p.n * windows.all_rows();
  return walk;
}

// The map as [n, (d, (h,)) w, channels], copied in boxes of `pixels` windows.
inline TensorMap map_of(const ConvProblem& p, const ConvWgmmaPlan& plan, const ConvWindows& windows,
                        int pixels, const void* map) {
  const int axes = plan.rank - 2;
  device::TensorView view{map, p.dtype, plan.rank, {windows.channels}, {1}};
  device::WindowBox box;
  box.channels = kDepth;
  box.pixels = pixels;
  int64_t step = windows.channels;
  for (int a = 0; a < axes; ++a) {
    view.extent[a + 1] = windows.map[2 - a];
    view.step[a + 1] = step;
    step *= windows.map[2 - a];
    box.lower[a] = static_cast<int>(windows.lower[2 - a]);
    box.upper[a] = static_cast<int>(windows.upper[2 - a]);
    box.stride[a] = static_cast<int>(windows.stride[2 - a]);
  }
  view.extent[axes + 1] = p.n;
  view.step[axes + 1] = step;
  return device::tensor_map(view, box);
}

// body(an element, the columns of a tile as a constant)
template <class T, class Body>
void dispatch_width(const ConvWgmmaPlan& plan, const Body& body) {
  using std::integral_constant;
  switch (plan.columns) {
    case 64:
      return body(T{}, integral_constant<int, 64>{});
    case 128:
      return body(T{}, integral_constant<int, 128>{});
    case 192:
      return body(T{}, integral_constant<int, 192>{});
    default:
      return body(T{}, integral_constant<int, 256>{});
  }
}
template <class Body>
void dispatch_wgmma(const ConvProblem& p, const ConvWgmmaPlan& plan, const Body& body) {
  if (p.dtype == DType::bf16) return dispatch_width<bf16>(plan, body);
  return dispatch_width<f16>(plan, body);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
