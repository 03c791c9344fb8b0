// What adaptive pooling on CPU shares: the boxes of the outputs, and how their sources are reduced.
//
// An output's window is a box of the input, and boxes differ, so there are no phases to split rows
// into. Each output row reads its rows of the input with unit stride, in one of three ways:
//
//   channels-last: the positions of one window are reduced channel by channel;
//   contiguous: the window's rows are reduced column by column, whole rows at a time, and the
//     columns of each window then by vectors where it is as wide as one;
//   contiguous, one output in a row (global pooling): the rows of the window are reduced into a few
//     vectors, whatever their length, and those at the end.
//
// Bound: bytes. The first two are the same loop over a list of sources, out[j] = reduce_k
// source_k[j], into states: sums (pool_adaptive_avg.h) or maxima (pool_adaptive_max.h).
#pragma once

#include "core/parallel.h"
#include "pool/pool_planes.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kRunVectors = 4;  // vectors of results that a loop keeps in registers

// What a window is read from: `count` addresses with their places in the window, ascending.
template <class T>
struct Sources {
  Scratch<const T*> address;
  Scratch<int64_t> place;
  int64_t count = 0;
  const T* end;  // of the memory that may be read

  Sources(int64_t capacity, const T* end) : address(capacity), place(capacity), end(end) {}
  void clear() { count = 0; }
  void add(const T* source, int64_t source_place) {
    address[count] = source;
    place[count++] = source_place;
  }
};

template <class T, class State, int kVectors>
WEFT_INLINE void reduce_block(const Sources<T>& sources, int64_t j, State (&states)[kVectors]) {
  for (int64_t k = 0; k < sources.count;) {
    const int64_t stop = k + State::kFold < sources.count ? k + State::kFold : sources.count;
    for (; k < stop; ++k)
      for (int v = 0; v < kVectors; ++v)
        states[v].take(load_vec(sources.address[k] + j + v * kLanes<T>), sources.place[k]);
    for (int v = 0; v < kVectors; ++v) states[v].fold(k);
  }
}

// Calls emit(j, state) for each vector of [0, n). Lanes beyond n hold what lies there, or zero.
template <class State, class T, class Emit>
WEFT_INLINE void reduce_sources(const Sources<T>& sources, int64_t n, const Emit& emit) {
  constexpr int64_t kBlockLanes = kRunVectors * kLanes<T>;
  int64_t j = 0;
  for (; j + kBlockLanes <= n; j += kBlockLanes) {
    State states[kRunVectors];
    reduce_block(sources, j, states);
    for (int v = 0; v < kRunVectors; ++v) emit(j + v * kLanes<T>, states[v]);
  }
  for (; j < n; j += kLanes<T>) {
    State states[1];
    const T* last = sources.address[sources.count - 1] + j;
    if (last + kLanes<T> <= sources.end) {
      reduce_block(sources, j, states);
    } else {
      const int64_t left = n - j < kLanes<T> ? n - j : kLanes<T>;
      for (int64_t k = 0; k < sources.count; ++k) {
        states[0].take(load_part(sources.address[k] + j, static_cast<int>(left)), sources.place[k]);
        if ((k + 1) % State::kFold == 0) states[0].fold(k + 1);
      }
    }
    emit(j, states[0]);
  }
}

// The same for the channels of large windows: as many positions as states fold are read at a time,
// all their channels, so that memory is read as it lies. `states` are held in between, one for each
// vector of [0, n).
template <class State, class T, class Emit>
WEFT_INLINE void reduce_positions(const Sources<T>& sources, int64_t n, State* states,
                                  const Emit& emit) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t count = sources.count;
  if (count <= 2 * State::kFold || n <= kRunVectors * kLane)
    return reduce_sources<State>(sources, n, emit);
  for (int64_t k = 0; k < count; k += State::kFold) {
    const int64_t stop = k + State::kFold < count ? k + State::kFold : count;
    const auto take = [&](int64_t j, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      State block[kVectors];
      if (k > 0)
        for (int v = 0; v < kVectors; ++v) block[v] = states[j / kLane + v];
      for (int64_t i = k; i < stop; ++i)
        for (int v = 0; v < kVectors; ++v) {
          // The last vector of all ends at n.
          const int64_t at = j + v * kLane + kLane <= n ? j + v * kLane : n - kLane;
          __builtin_prefetch(sources.address[i + State::kFold < count ? i + State::kFold : i] + at);
          block[v].take(load_vec(sources.address[i] + at), sources.place[i]);
        }
      for (int v = 0; v < kVectors; ++v) {
        block[v].fold(stop);
        const int64_t at = j + v * kLane + kLane <= n ? j + v * kLane : n - kLane;
        if (stop < count)
          states[j / kLane + v] = block[v];
        else
          emit(at, block[v]);
      }
    };
    int64_t j = 0;
    for (; j + kRunVectors * kLane <= n; j += kRunVectors * kLane)
      take(j, std::integral_constant<int, kRunVectors>{});
    for (; j < n; j += kLane) take(j, std::integral_constant<int, 1>{});
  }
}

// `value` in the first `count` lanes, `rest` in the others.
template <class A>
WEFT_INLINE Vec<A> first_lanes(Vec<A> value, int64_t count, A rest) {
  using I = lane_int<A>;
  Vec<I> lane;
  for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
  return lane < broadcast<Vec<I>>(static_cast<I>(count)) ? value : Vec<A>{} + rest;
}

// Reduces the sources over [0, n) into kRunVectors states; the place of a lane's result is the
// state's plus the lane.
template <class T, class State>
WEFT_INLINE void reduce_runs(const Sources<T>& sources, int64_t n, State (&states)[kRunVectors]) {
  constexpr int64_t kBlockLanes = kRunVectors * kLanes<T>;
  int64_t taken = 0;
  for (int64_t k = 0; k < sources.count; ++k) {
    const T* run = sources.address[k];
    const int64_t place = sources.place[k];
    int64_t j = 0;
    for (; j + kBlockLanes <= n; j += kBlockLanes) {
      for (int v = 0; v < kRunVectors; ++v)
        states[v].take(load_vec(run + j + v * kLanes<T>), place + j + v * kLanes<T>);
      if (++taken % State::kFold == 0)
        for (int v = 0; v < kRunVectors; ++v) states[v].fold(taken);
    }
    for (int v = 0; v < kRunVectors; ++v, j += kLanes<T>) {
      if (j + kLanes<T> <= n) {
        states[v].take(load_vec(run + j), place + j);
      } else if (j < n) {
        const int64_t left = n - j;
        const auto value = run + j + kLanes<T> <= sources.end
                               ? load_vec(run + j)
                               : load_part(run + j, static_cast<int>(left));
        states[v].take(first_lanes<accumulate_t<T>>(value, left, State::kNeutral), place + j);
      }
    }
  }
}

// The windows on one axis, since finding them takes divisions.
struct AxisBoxes {
  Scratch<int64_t> first;
  Scratch<int64_t> size;

  AxisBoxes(const PoolProblem& p, int axis) : first(p.out[axis]), size(p.out[axis]) {
    for (int64_t o = 0; o < p.out[axis]; ++o) {
      first[o] = p.window[axis].first_input(o);
      size[o] = places_inside(p.window[axis], o, p.in[axis]).end;
    }
  }
};

// Calls body(row index, outer, od, oh) for rows [begin, end) of [outer, extents[0], extents[1]].
template <class Body>
WEFT_INLINE void for_each_row(const int64_t (&extents)[3], int64_t begin, int64_t end,
                              const Body& body) {
  int64_t h = begin % extents[1];
  int64_t d = begin / extents[1] % extents[0];
  int64_t outer = begin / (extents[1] * extents[0]);
  for (int64_t index = begin; index < end; ++index) {
    body(index, outer, d, h);
    if (++h < extents[1]) continue;
    h = 0;
    if (++d < extents[0]) continue;
    d = 0;
    ++outer;
  }
}

// The boxes of all outputs, and what the outputs of one row or one window read.
template <class T>
struct BoxReader {
  const PoolProblem& p;
  const T* x;
  AxisBoxes depth, height, width;
  Sources<T> rows, positions;

  BoxReader(const PoolProblem& p, const T* x)
      : p(p),
        x(x),
        depth(p, 0),
        height(p, 1),
        width(p, 2),
        rows(p.window[0].size * p.window[1].size, x + p.in_elements()),
        positions(p.inner > 1 ? p.window_elements() : 0, x + p.in_elements()) {}

  // `rows` become those of the input that output row (od, oh) reads.
  WEFT_INLINE void select_rows(int64_t outer, int64_t od, int64_t oh) {
    const T* plane = x + outer * p.in_positions() * p.inner;
    rows.clear();
    for (int64_t i = 0; i < depth.size[od]; ++i)
      for (int64_t j = 0; j < height.size[oh]; ++j)
        rows.add(
            plane + ((depth.first[od] + i) * p.in[1] + height.first[oh] + j) * p.in[2] * p.inner,
            (i * p.window[1].size + j) * p.window[2].size);
  }

  // `positions` become those of the selected rows that output `ow` of a channels-last row reads.
  WEFT_INLINE void select_positions(int64_t ow) {
    positions.clear();
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < width.size[ow]; ++k)
        positions.add(rows.address[i] + (width.first[ow] + k) * p.inner, rows.place[i] + k);
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
