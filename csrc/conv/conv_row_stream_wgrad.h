// Small windows in conv_rows_wgrad.h: a vector of columns, down the rows of a band.
//
// The last rows of the gradient go around in registers beside the sums of all places: each row of
// the source is loaded once, at each tap's column, for all the gradient's rows that it meets.
#pragma once

#include "conv/conv_row_taps.h"

namespace weft::WEFT_TARGET {
namespace {

// Of at most so many places a tap.
inline constexpr int kWgradStreamPlaces = 3;

// The last vector of a row, which has `left` columns; all others are zero.
template <class Acc>
WEFT_INLINE Vec<Acc> first_lanes(Vec<Acc> value, int64_t left) {
  using Mask = typename LaneMask<Acc>::type;
  typename vector_of<Mask>::type lane;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(Acc)); ++i) lane[i] = i;
  return lane < static_cast<Mask>(left) ? value : Vec<Acc>{};
}

// Planes of some images, `step` apart, with rows `pitch` apart.
template <class T>
struct HeldPlanes {
  const T* data;
  int64_t step;
  int64_t pitch;
};

// sum += x · gy over `rows` rows of one vector of columns, of which `left` count unless kWhole.
template <class T, int kPlaces, int kColumns, bool kWhole>
WEFT_INLINE void add_column(const accumulate_t<T>* const (&x)[kColumns], int64_t x_pitch,
                            const T* gy, int64_t gy_pitch, int64_t rows, int64_t left,
                            Vec<accumulate_t<T>> (&sum)[kColumns][kPlaces]) {
  using Acc = accumulate_t<T>;
  Vec<Acc> g[kPlaces] = {};  // row i of the gradient is g[i % kPlaces]
  const int64_t steps = rows + kPlaces - 1;
  int64_t s = 0, at = 0;
  const auto step = [&](auto phase, auto inner) __attribute__((always_inline)) {
    constexpr int kPhase = decltype(phase)::value;
    constexpr bool kInner = decltype(inner)::value == 1;
    if (kInner || s < rows)
      g[kPhase] = kWhole ? load_vec(gy) : load_part(gy, static_cast<int>(left));
#pragma GCC unroll 4
    for (int t = 0; t < kColumns; ++t) {
      Vec<Acc> value = in_register(load_vec(x[t] + at));
      if constexpr (!kWhole) value = first_lanes<Acc>(value, left);
#pragma GCC unroll 4
      for (int j = 0; j < kPlaces; ++j)
        if (kInner || (s >= j && s - j < rows))
          sum[t][j] += value * g[(kPhase + kPlaces - j) % kPlaces];
    }
    gy += gy_pitch;
    at += x_pitch;
    ++s;
  };
  constexpr int kFirst = kPlaces - 1;
  if constexpr (kPlaces > 1) step(Count<0>{}, Count<0>{});
  if constexpr (kPlaces > 2) step(Count<1>{}, Count<0>{});
  while (s + kPlaces <= rows) {
    step(Count<kFirst>{}, Count<1>{});
    if constexpr (kPlaces > 1) step(Count<(kFirst + 1) % kPlaces>{}, Count<1>{});
    if constexpr (kPlaces > 2) step(Count<(kFirst + 2) % kPlaces>{}, Count<1>{});
  }
  const auto last = [&](auto phase) __attribute__((always_inline)) {
    if (s < steps) step(phase, Count<0>{});
  };
  last(Count<kFirst>{});
  last(Count<(kFirst + 1) % kPlaces>{});
  last(Count<(kFirst + 2) % kPlaces>{});
  last(Count<(kFirst + 3) % kPlaces>{});
}

// totals[place] += x · gy over `images` × `rows` × `columns`, for kPlaces places of kColumns taps;
// gy is read where it lies. What x holds past the columns may be infinite.
template <class T, int kPlaces, int kColumns>
void stream_wgrad(const ColumnTap* taps, int64_t images, Range rows, int64_t columns,
                  HeldPlanes<accumulate_t<T>> x, HeldPlanes<T> gy, accumulate_t<T>* totals) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const int64_t count = rows.end - rows.begin, whole = columns - columns % kLane;
  Vec<Acc> sum[kColumns][kPlaces] = {};
  for (; images > 0; --images, x.data += x.step, gy.data += gy.step) {
    const Acc* from[kColumns];
    for (int t = 0; t < kColumns; ++t) from[t] = x.data + taps[t].source + rows.begin * x.pitch;
    const T* const grads = gy.data + rows.begin * gy.pitch;
    for (int64_t column = 0; column < whole; column += kLane) {
      add_column<T, kPlaces, kColumns, true>(from, x.pitch, grads + column, gy.pitch, count, 0,
                                             sum);
      for (int t = 0; t < kColumns; ++t) from[t] += kLane;
    }
    if (whole < columns)
      add_column<T, kPlaces, kColumns, false>(from, x.pitch, grads + whole, gy.pitch, count,
                                              columns - whole, sum);
  }
  for (int t = 0; t < kColumns; ++t)
    for (int j = 0; j < kPlaces; ++j) {
      Acc* const to = totals + (taps[t].weight + j * taps[t].step) * kLane;
      store_vec(to, load_vec(to) + sum[t][j]);
    }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
