// Bands of contiguous planes: what the kernels of conv_planes.h and conv_rows.h copy into scratch,
// and where a window's places find their source there.
//
// A task copies the source rows that a band of destination rows reads, widened to the accumulation
// type and split by the stride's phases, with zeros for the padding. A place of the window is then
// an offset that all positions of a phase share.
#pragma once

#include <utility>

#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int64_t kScratchElements = 48 * 1024;

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Source positions of an axis in scratch: position i is in phase (i + lead) % phases, at place
// (i + lead) / phases of it.
struct AxisLayout {
  int64_t phases;
  int64_t lead;
  int64_t extent;  // places of a phase that are read
};

// For destinations [begin, end).
inline AxisLayout axis_layout(const Window& w, int64_t begin, int64_t end, bool transposed) {
  if (!transposed)
    return {w.stride, -w.first_input(begin), end - begin + (w.span() - 1) / w.stride};
  const int64_t lead = -floor_div(begin + w.padding - w.span() + 1, w.stride);
  return {1, lead, (end - 1 + w.padding) / w.stride + lead + 1};
}

// The source of a band of destination rows in scratch: [slice, row phase, column phase, row,
// pitch].
struct Planes {
  Range slices;
  Range source_rows;
  AxisLayout rows;
  AxisLayout columns;
  // A row's end is the next one's leading padding: the pitch is such that what is read past a row's
  // columns is zero in the next row too.
  int64_t pitch;
  int64_t margin = 0;  // places in front of each row, before its padding

  int64_t plane() const { return rows.extent * pitch; }
  int64_t slice() const { return rows.phases * columns.phases * plane(); }
  int64_t channel() const { return (slices.end - slices.begin) * slice(); }
};

inline Planes band_planes(const ConvProblem& p, const Gather& g, int64_t d, int64_t first_row,
                          int64_t last_row) {
  Planes planes;
  planes.slices = sources_of(p.window[0], d, d + 1, g.src[0], g.transposed);
  planes.source_rows = sources_of(p.window[1], first_row, last_row, g.src[1], g.transposed);
  planes.rows = axis_layout(p.window[1], first_row, last_row, g.transposed);
  AxisLayout& columns = planes.columns;
  columns = axis_layout(p.window[2], 0, g.dst[2], g.transposed);
  if (columns.lead < 0) {  // the first columns are not read
    columns.extent -= columns.lead;
    columns.lead = 0;
  }
  const int64_t count = g.transposed ? ceil_div(g.dst[2], p.window[2].stride) : g.dst[2];
  planes.pitch = most(count, most(columns.extent - columns.lead / columns.phases,
                                  (columns.lead + g.src[2] - 1) / columns.phases + 1));
  return planes;
}

template <class T>
void narrow_row(T* out, const accumulate_t<T>* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(out + i, load_vec(in + i));
  if (i < count)
    store_part(out + i, load_part(in + i, static_cast<int>(count - i)),
               static_cast<int>(count - i));
}

// a and b, of 2n elements together: first those at even places, then those at odd ones; and back.
template <class V, int... Lane>
WEFT_INLINE void unzip(V& a, V& b, std::integer_sequence<int, Lane...>) {
  const V even = __builtin_shufflevector(a, b, 2 * Lane...);
  b = __builtin_shufflevector(a, b, (2 * Lane + 1)...);
  a = even;
}
template <class V, int... Lane>
WEFT_INLINE void zip(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  const V low = __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * kCount)...);
  b = __builtin_shufflevector(a, b, (kCount / 2 + Lane / 2 + Lane % 2 * kCount)...);
  a = low;
}
template <class V>
using LaneSequence = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;
template <class V>
WEFT_INLINE void unzip(V& a, V& b) {
  unzip(a, b, LaneSequence<V>{});
}
template <class V>
WEFT_INLINE void zip(V& a, V& b) {
  zip(a, b, LaneSequence<V>{});
}

// copy_row that fills the last vector with zeros.
template <class T>
WEFT_INLINE void copy_row_whole(accumulate_t<T>* out, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(out + i, load_vec(in + i));
  if (i < count) store_vec(out + i, load_part(in + i, static_cast<int>(count - i)));
}

// The even and the odd ones of `count` elements; with `whole`, zeros fill the last vectors.
template <class T>
WEFT_INLINE void split_row(accumulate_t<T>* even, accumulate_t<T>* odd, const T* in, int64_t count,
                           bool whole) {
  int64_t i = 0;
  for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
    Vec<accumulate_t<T>> a = load_vec(in + i), b = load_vec(in + i + kLanes<T>);
    unzip(a, b);
    store_vec(even + i / 2, a);
    store_vec(odd + i / 2, b);
  }
  if (i == count) return;
  const auto left = static_cast<int>(count - i);
  const int front = left < kLanes<T> ? left : kLanes<T>;
  Vec<accumulate_t<T>> a = load_lanes(in + i, left), b{};
  if (left > front) b = load_part(in + i + front, left - front);
  unzip(a, b);
  if (whole) {
    store_vec(even + i / 2, a);
    store_vec(odd + i / 2, b);
  } else {
    store_part(even + i / 2, a, (left + 1) / 2);
    store_part(odd + i / 2, b, left / 2);
  }
}

// Every third of 3n elements, from the one at kPhase on.
template <int kPhase, class V, int... Lane>
WEFT_INLINE V third(V a, V b, V c, std::integer_sequence<int, Lane...>) {
  constexpr int kCount = sizeof...(Lane), kTwo = 2 * kCount;
  const V front =
      __builtin_shufflevector(a, b, (3 * Lane + kPhase < kTwo ? 3 * Lane + kPhase : 0)...);
  return __builtin_shufflevector(front, c,
                                 (3 * Lane + kPhase < kTwo ? Lane : 3 * Lane + kPhase - kCount)...);
}
template <class V>
WEFT_INLINE void split(V (&v)[3]) {
  const V a = v[0], b = v[1], c = v[2];
  v[0] = third<0>(a, b, c, LaneSequence<V>{});
  v[1] = third<1>(a, b, c, LaneSequence<V>{});
  v[2] = third<2>(a, b, c, LaneSequence<V>{});
}
template <class V>
WEFT_INLINE void split(V (&v)[4]) {
  unzip(v[0], v[1]);
  unzip(v[2], v[3]);
  unzip(v[0], v[2]);
  unzip(v[1], v[3]);
}

// Of six and eight: the even and the odd elements, then each of them.
template <class V, size_t kCount>
WEFT_INLINE void split(V (&v)[kCount]) {
  V even[kCount / 2], odd[kCount / 2];
  for (size_t i = 0; i < kCount / 2; ++i) {
    even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    unzip(even[i], odd[i]);
  }
  split(even);
  split(odd);
  for (size_t i = 0; i < kCount / 2; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
}

// `count` elements, of which those at i, i + kPhases, ... go to out[i].
template <class T, int kPhases>
WEFT_INLINE void split_row(accumulate_t<T>* const (&out)[kPhases], const T* in, int64_t count) {
  constexpr int64_t kStep = kPhases * kLanes<T>;
  for (int64_t at = 0; at < count; at += kStep) {
    const int64_t left = count - at;
    Vec<accumulate_t<T>> v[kPhases] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kPhases; ++i)
      if (left > i * kLanes<T>) v[i] = load_lanes(in + at + i * kLanes<T>, left - i * kLanes<T>);
    split(v);
#pragma GCC unroll 8
    for (int i = 0; i < kPhases; ++i)
      if (left > i) store_lanes(out[i] + at / kPhases, v[i], (left - i + kPhases - 1) / kPhases);
  }
}

// Whether some place of the window reads a phase: all are taken to be read where there are enough
// places for it.
inline bool phase_is_read(const Window& w, int64_t phase, int64_t phases) {
  if (w.size >= phases) return true;
  for (int64_t k = 0; k < w.size; ++k)
    if (k * w.dilation % phases == phase) return true;
  return false;
}

// Copies one channel of the source into its planes; padding is not written, but may be overwritten
// with zeros where rows have `margin`. Calls on_row(row) before each row.
template <class T, class OnRow>
WEFT_INLINE void fill_planes(const ConvProblem& p, const Gather& g, const Planes& planes,
                             const T* channel, accumulate_t<T>* out, const OnRow& on_row) {
  const AxisLayout& columns = planes.columns;
  const int64_t plane = planes.plane(), width = g.src[2], pitch = planes.pitch;
  const int64_t phases = planes.rows.phases;
  for (int64_t slice = planes.slices.begin; slice < planes.slices.end; ++slice) {
    const int64_t first = slice * g.src[1] + planes.source_rows.begin;
    const int64_t padded = planes.source_rows.begin + planes.rows.lead;
    const T* from = channel + first * width;
    accumulate_t<T>* const to_slice =
        out + planes.margin + (slice - planes.slices.begin) * planes.slice();
    if (phases == 1 && columns.phases == 1) {
      accumulate_t<T>* to = to_slice + padded * pitch + columns.lead;
      for (int64_t row = planes.source_rows.begin; row < planes.source_rows.end; ++row) {
        on_row(row);
        if (planes.margin > 0)
          copy_row_whole(to, from, width);
        else
          copy_row(to, from, width);
        to += pitch, from += width;
      }
      continue;
    }
    int64_t phase = padded % phases, at = padded / phases;
    for (int64_t row = planes.source_rows.begin; row < planes.source_rows.end; ++row) {
      on_row(row);
      const T* const in = from;
      from += width;
      accumulate_t<T>* to = to_slice + phase * columns.phases * plane + at * pitch;
      const bool read = phase_is_read(p.window[1], phase, phases);
      if (++phase == phases) phase = 0, ++at;
      if (!read) continue;
      if (columns.phases == 1) {
        copy_row(to + columns.lead, in, width);
        continue;
      }
      if (columns.phases == 2) {
        // Column 0 is in the phase of `lead`.
        accumulate_t<T>* const same = to + (columns.lead % 2) * plane + columns.lead / 2;
        accumulate_t<T>* const other = to + (columns.lead + 1) % 2 * plane + (columns.lead + 1) / 2;
        split_row(same, other, in, width, planes.margin > 0);
        continue;
      }
      const auto split_phases = [&](auto phase_count) __attribute__((always_inline)) {
        constexpr int kPhases = decltype(phase_count)::value;
        accumulate_t<T>* out[kPhases];
        for (int i = 0; i < kPhases; ++i)
          out[i] = to + (columns.lead + i) % kPhases * plane + (columns.lead + i) / kPhases;
        split_row<T, kPhases>(out, in, width);
      };
      if (columns.phases == 3) {
        split_phases(Count<3>{});
        continue;
      }
      if (columns.phases == 4) {
        split_phases(Count<4>{});
        continue;
      }
      for (int64_t i = 0; i < columns.phases; ++i, to += plane) {
        if (!phase_is_read(p.window[2], i, columns.phases)) continue;
        const int64_t skipped = ceil_div(most(columns.lead - i, 0), columns.phases);
        const int64_t begin = skipped * columns.phases + i - columns.lead;
        const int64_t count = begin < width ? ceil_div(width - begin, columns.phases) : 0;
        for (int64_t q = 0; q < count; ++q) to[skipped + q] = widen(in[begin + q * columns.phases]);
      }
    }
  }
}

template <class T>
void fill_planes(const ConvProblem& p, const Gather& g, const Planes& planes, const T* channel,
                 accumulate_t<T>* out) {
  fill_planes(p, g, planes, channel, out, [](int64_t) {});
}

// One place of the window, as offsets into a channel's scratch and into its weights.
struct Tap {
  int64_t source;
  int64_t weight;
};

// Where place k finds the source of an axis phase's first position in scratch; false if that phase
// does not meet it.
inline bool place_in_scratch(const Window& w, const AxisLayout& layout, const AxisPhase& phase,
                             int64_t k, bool transposed, int64_t* source_phase, int64_t* at) {
  const int64_t offset = k * w.dilation;
  if (!transposed) {
    *source_phase = offset % w.stride;
    *at = offset / w.stride;
    return true;
  }
  const int64_t padded = phase.first + w.padding - offset;
  *source_phase = 0;
  *at = padded / w.stride + layout.lead;
  return padded % w.stride == 0;
}

// The taps of one phase of a band's destination, and which of them each of its rows needs.
struct PhaseTaps {
  AxisPhase rows;
  AxisPhase columns;
  Tap* taps;
  Range* of_row;

  // Taps that one of the flat positions [begin, end) needs.
  Range of(int64_t begin, int64_t end, int64_t pitch) const {
    const int64_t last = least((end - 1) / pitch, rows.count - 1);
    Range all = of_row[begin / pitch];
    for (int64_t row = begin / pitch + 1; row <= last; ++row) {
      all.begin = least(all.begin, of_row[row].begin);
      all.end = most(all.end, of_row[row].end);
    }
    return all;
  }
};

// Returns how many taps there are.
inline int64_t list_taps(const ConvProblem& p, const Gather& g, const Planes& planes, int64_t d,
                         PhaseTaps& out) {
  const int64_t all = p.window_elements();
  for (int64_t row = 0; row < out.rows.count; ++row) out.of_row[row] = {all, 0};
  int64_t count = 0;
  for (int64_t j = 0; j < p.window[1].size; ++j) {
    int64_t row_phase, row_at;
    if (!place_in_scratch(p.window[1], planes.rows, out.rows, j, g.transposed, &row_phase, &row_at))
      continue;
    const int64_t begin = count;
    for (int64_t i = 0; i < p.window[0].size; ++i) {
      const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
      if (slice < 0) continue;
      for (int64_t l = 0; l < p.window[2].size; ++l) {
        int64_t phase, at;
        if (!place_in_scratch(p.window[2], planes.columns, out.columns, l, g.transposed, &phase,
                              &at))
          continue;
        out.taps[count++] = {(slice - planes.slices.begin) * planes.slice() +
                                 (row_phase * planes.columns.phases + phase) * planes.plane() +
                                 row_at * planes.pitch + at,
                             (i * p.window[1].size + j) * p.window[2].size + l};
      }
    }
    for (int64_t row = 0; row < out.rows.count; ++row) {
      const int64_t h = out.rows.first + row * out.rows.step;
      if (source_of(p.window[1], h, j, g.src[1], g.transposed) < 0) continue;
      out.of_row[row] = {least(out.of_row[row].begin, begin), count};
    }
  }
  return count;
}

// Destination rows of a task: as many as have their source in `scratch_elements`, but few enough
// for several tasks. Whole strides, so that each phase has the same rows.
inline int64_t band_rows(const ConvProblem& p, const Gather& g, int64_t scratch_elements) {
  const int64_t step = g.transposed ? p.window[1].stride : 1;
  const int64_t images = p.n * p.groups * g.dst[0];
  int64_t rows = round_up(g.dst[1], step);
  const auto elements = [&] {
    return g.src_channels * band_planes(p, g, g.dst[0] / 2, 0, least(rows, g.dst[1])).channel();
  };
  while (rows > step &&
         (elements() > scratch_elements || (rows > 8 && images * ceil_div(g.dst[1], rows) < 8)))
    rows = round_up(rows / 2, step);
  return rows;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
