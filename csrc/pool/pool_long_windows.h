// How a block walks one long window: its rows (contiguous), or its positions (channels-last).
#pragma once

#include "device/index.h"
#include "pool/pool_plan_cuda.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kReduceThreads = pool_plan::kReduceThreads;
constexpr int kReduceWarps = kReduceThreads / 32;

// ---- contiguous maps
// -----------------------------------------------------------------------------

// The window of one output as runs of memory: run r of [planes, rows] begins `first` elements into
// the map, and its elements are the window's places from `place` on.
struct WindowRows {
  int64_t first;
  int64_t planes, rows, run;
  int64_t plane_step, row_step;  // in memory
  int64_t element_step;          // dilation of W
  int64_t place, plane_places, row_places;
};

WEFT_DEVICE WindowRows window_rows(const PoolProblem& p, int64_t output) {
  const device::Element e = device::split(output, p.out, 1);
  const int64_t at[3] = {e.d, e.h, e.w};
  Range k[3];
  int64_t first[3];
  for (int a = 0; a < 3; ++a) {
    k[a] = places_inside(p.window[a], at[a], p.in[a]);
    first[a] = p.window[a].first_input(at[a]) + k[a].begin * p.window[a].dilation;
    if (k[a].end < k[a].begin) k[a].end = k[a].begin;
  }
  WindowRows r;
  r.first = device::flat_index(e, first[0], first[1], first[2], p.in, 1);
  r.planes = k[0].end - k[0].begin;
  r.rows = k[1].end - k[1].begin;
  r.run = k[2].end - k[2].begin;
  r.row_step = p.window[1].dilation * p.in[2];
  r.plane_step = p.window[0].dilation * p.in[1] * p.in[2];
  r.element_step = p.window[2].dilation;
  r.row_places = p.window[2].size;
  r.plane_places = p.window[1].size * p.window[2].size;
  r.place = k[0].begin * r.plane_places + k[1].begin * r.row_places + k[2].begin;
  return r;
}

// Calls body(value, place) for this thread's share of the window, places ascending: packs of 16
// bytes, neighbours in neighbouring threads, and the ends of each row element by element.
template <class T, class Body>
WEFT_DEVICE void for_window_rows(const WindowRows& r, const T* x, const Body& body) {
  constexpr int kPack = 16 / sizeof(T);
  const int thread = device::thread_index();
  for (int64_t plane = 0; plane < r.planes; ++plane)
    for (int64_t row = 0; row < r.rows; ++row) {
      const T* from = x + r.first + plane * r.plane_step + row * r.row_step;
      const int64_t place = r.place + plane * r.plane_places + row * r.row_places;
      if (r.element_step != 1) {
        for (int64_t i = thread; i < r.run; i += kReduceThreads)
          body(widen(device::load(from + i * r.element_step)), place + i);
        continue;
      }
      const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
      for (int64_t i = static_cast<int64_t>(thread) * kPack - past; i < r.run;
           i += kReduceThreads * kPack) {
        if (i >= 0 && i + kPack <= r.run) {
          const auto pack = device::load_pack<kPack>(from + i);
          for (int j = 0; j < kPack; ++j) body(widen(pack[j]), place + i + j);
          continue;
        }
        for (int64_t j = i; j < i + kPack; ++j)
          if (j >= 0 && j < r.run) body(widen(device::load(from + j)), place + j);
      }
    }
}

// ---- channels-last maps
// --------------------------------------------------------------------------

// A thread's channels of one output: `lanes` neighbouring threads share a position, and `groups` of
// them share the window's positions.
struct ChannelRun {
  device::Element at;  // the output; `inner` is the thread's first channel
  int64_t target;      // its flat index
  int lanes, groups, group;
  bool works;  // has channels
};

template <int kPack>
WEFT_DEVICE ChannelRun channel_run(const PoolProblem& p, int run) {
  const int64_t runs = ceil_div(p.inner, run);
  const int64_t output = device::block_index() / runs;
  const int64_t first = device::block_index() % runs * run;
  ChannelRun r;
  r.lanes = static_cast<int>(ceil_div(run, kPack));
  r.groups = kReduceThreads / r.lanes;
  r.group = device::thread_index() / r.lanes;
  r.at = device::split(output, p.out, 1);
  r.at.inner = first + device::thread_index() % r.lanes * kPack;
  r.works = r.group < r.groups && r.at.inner < p.inner;
  r.target = output * p.inner + r.at.inner;
  return r;
}

// Calls body(offset of the first channel, place) for this thread's positions, places ascending.
template <class Body>
WEFT_DEVICE void for_window_positions(const PoolProblem& p, const ChannelRun& r, const Body& body) {
  if (!r.works) return;
  const Range kd = places_inside(p.window[0], r.at.d, p.in[0]);
  const Range kh = places_inside(p.window[1], r.at.h, p.in[1]);
  const Range kw = places_inside(p.window[2], r.at.w, p.in[2]);
  const int64_t rows = kh.end - kh.begin;
  const int64_t columns = kw.end - kw.begin;
  if (kd.end <= kd.begin || rows <= 0 || columns <= 0) return;
  const int64_t positions = (kd.end - kd.begin) * rows * columns;
  for (int64_t at = r.group; at < positions; at += r.groups) {
    const int64_t k = kw.begin + at % columns;
    const int64_t j = kh.begin + at / columns % rows;
    const int64_t i = kd.begin + at / columns / rows;
    const int64_t d = p.window[0].first_input(r.at.d) + i * p.window[0].dilation;
    const int64_t h = p.window[1].first_input(r.at.h) + j * p.window[1].dilation;
    const int64_t w = p.window[2].first_input(r.at.w) + k * p.window[2].dilation;
    body(device::flat_index(r.at, d, h, w, p.in, p.inner),
         (i * p.window[1].size + j) * p.window[2].size + k);
  }
}

template <int N, class T>
WEFT_DEVICE void read_values(const T* from, T (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = device::load(from);
  } else {
    const auto pack = device::load_pack<N>(from);
    for (int i = 0; i < N; ++i) values[i] = pack[i];
  }
}

inline bool has_channel_packs(const PoolProblem& p, int pack, const void* x) {
  return p.inner % pack == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
