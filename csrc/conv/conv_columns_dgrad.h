// Input gradients of few channels, contiguous, on CPU: conv_columns.h backwards.
//
// A task walks down some rows of gx. Products of gy's channels with the weights of a place are
// vectors along flat positions of gy, which are added to scratch rows, one for each channel, row of
// gx and column of the window; no place or phase has edges of its own. A row that no later row of
// gy reaches is finished: its columns of the window are added, a stride's phases zipped. Bound:
// FLOPs. Tried and lost: phases of gx apart (conv_planes.h), whose tiles of few channels load a
// vector for three products and whose bands read gy's rows again.
#pragma once

#include "conv/conv_columns.h"

namespace weft::WEFT_TARGET {
namespace {

// out[offsets[r]] += the sum over `terms` of weights [term, row] · gy [term, position], of which
// `left` positions are there. Meanwhile asks for what lies `ahead`, a step further for each term.
template <int kRows, int kVectors, class T, class Acc>
__attribute__((noinline)) void column_scatter(const Acc* gy, int64_t terms, const Acc* weights,
                                              const int64_t* offsets, Acc* out, int64_t left,
                                              const T* ahead, int64_t ahead_step) {
  using V = Vec<Acc>;
  constexpr int kLane = kLanes<Acc>;
  V sum[kRows][kVectors];
  each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] = V{}; });
  for (int64_t i = 0; i < terms; ++i, weights += kRows, gy += kColumnVectors * kLane) {
    __builtin_prefetch(ahead);
    ahead += ahead_step;
    V g[kVectors];
    for (int v = 0; v < kVectors; ++v) g[v] = load_vec(gy + v * kLane);
    each_of<kRows, kVectors>([&](int r, int v) { sum[r][v] += weights[r] * g[v]; });
  }
  if (left >= kVectors * kLane)
    return each_of<kRows, kVectors>([&](int r, int v) {
      Acc* const at = out + offsets[r] + v * kLane;
      store_vec(at, load_vec(at) + sum[r][v]);
    });
  each_of<kRows, kVectors>([&](int r, int v) {
    Acc* const at = out + offsets[r] + v * kLane;
    const int64_t there = left - v * kLane;
    if (there > 0) store_lanes(at, load_lanes(at, there) + sum[r][v], there);
  });
}

template <class Acc>
void add_row(Acc* to, const Acc* from, int64_t count) {
  constexpr int kLane = kLanes<Acc>;
  int64_t i = 0;
  for (; i + kLane <= count; i += kLane) store_vec(to + i, load_vec(to + i) + load_vec(from + i));
  const int64_t left = count - i;
  if (left > 0) store_lanes(to + i, load_lanes(to + i, left) + load_lanes(from + i, left), left);
}

template <int kPhases, class T>
void zip_lines(const PhaseLines<accumulate_t<T>>& lines, T* to) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  for (int64_t at = 0; at < lines.in; at += kPhases * kLane) {
    Vec<Acc> v[kPhases];
    for (int i = 0; i < kPhases; ++i) v[i] = load_vec(lines.input[i] + at / kPhases);
    if constexpr (kPhases == 4) {
      zip(v[0], v[2]);
      zip(v[1], v[3]);
      zip(v[2], v[3]);
    }
    zip(v[0], v[1]);
    for (int64_t i = 0; i < kPhases; ++i) {
      const int64_t left = lines.in - at - i * kLane;
      if (left > 0) store_lanes(to + at + i * kLane, v[i], left);
    }
  }
}

// A row of gx: `start` + the columns of the window at rows, `column` apart; null: there are none.
template <class T>
void join_columns(PhaseLines<accumulate_t<T>>& lines, int64_t columns, const accumulate_t<T>* rows,
                  int64_t column, accumulate_t<T> start, T* to) {
  lines.clear(start);
  if (rows != nullptr)
    for (int64_t l = 0; l < columns; ++l) add_row(lines.column[l], rows + l * column, lines.out);
  if (lines.phases == 1) return narrow_row(to, lines.input[0], lines.in);
  if (lines.phases == 2) return zip_lines<2>(lines, to);
  if (lines.phases == 4) return zip_lines<4>(lines, to);
  for (int64_t i = 0; i < lines.phases; ++i) {
    const accumulate_t<T>* from = lines.input[i];
    for (int64_t q = i; q < lines.in; q += lines.phases) to[q] = narrow<T>(*from++);
  }
}

// Scratch rows that have the products of gy's rows from `first` on.
template <class T>
struct ColumnSums {
  using Acc = accumulate_t<T>;

  ColumnRows layout;
  int64_t first;
  Acc* data;

  // Goes on at the next band, of which some rows have sums already.
  void carry(int64_t channels) {
    const int64_t done = layout.positions(), kept = layout.plane() - done;
    for (int64_t i = 0; i < channels * layout.columns; ++i)
      for (int64_t phase = 0; phase < layout.phases; ++phase) {
        Acc* const plane = data + i * layout.column() + phase * layout.plane();
        memmove(plane, plane + done, kept * sizeof(Acc));
        fill(plane + kept, done, Acc{0});
      }
    first += layout.rows;
  }
  // Of row h of gx; null: no row of the window is there.
  const Acc* row(const Window& w, int64_t h) const {
    const int64_t at = h + w.padding - first * w.stride;
    if (at < 0 || at / w.stride >= layout.extent) return nullptr;
    return data + at % w.stride * layout.plane() + at / w.stride * layout.width;
  }
};

template <class T>
void dgrad_columns(const ConvProblem& p, const T* gy, const T* w, const T* bias, T* gx,
                   const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kWidth = kColumnVectors * kLanes<T>;
  const int64_t slices = p.window[0].size, area = p.window[1].size * p.window[2].size;
  const int64_t rows = p.c * area;  // of weights: channels and places of a slice of the window
  const int64_t images = p.n * p.groups * p.in[0];
  constexpr int64_t kTasks = 8, kLeastRows = 16;
  const int64_t ranges = most(1, least(ceil_div(kTasks, images), p.in[1] / kLeastRows));
  const int64_t band = column_band(p, p.c * p.window[2].size, kLanes<T>, kColumnElements, kTasks);
  ColumnRows layout = column_rows(p, band, kLanes<T>);
  layout.slices = 1;

  Scratch<int64_t> offsets(rows), weight(rows);
  for (int64_t row = 0; row < rows; ++row) {
    offsets[row] = row / area * layout.channel() + row % p.window[2].size * layout.column() +
                   layout.row_offset(p.window[1], row % area / p.window[2].size);
    weight[row] = row / area * slices * area + row % area;
  }
  // [group, slice of the window, tile of rows, k, row of the tile]
  Scratch<Acc> packed(p.weight_elements());
  Acc* to = packed.data();
  for (int64_t i = 0; i < p.groups * slices; ++i) {
    const T* const from = w + i / slices * p.k * rows * slices + i % slices * area;
    for_equal_parts<kColumnRows>(rows, [&](auto of_tile, int64_t first) {
      for (int64_t k = 0; k < p.k; ++k)
        for (int64_t r = 0; r < decltype(of_tile)::value; ++r)
          *to++ = widen(from[k * rows * slices + weight[first + r]]);
    });
  }

  parallel_for(context, images * ranges, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> scratch(p.c * layout.channel()), block(p.k * kWidth);
    PhaseLines<Acc> lines(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t range = task % ranges, d = task / ranges % p.in[0];
      const int64_t image = task / ranges / p.in[0], group = image % p.groups;
      const int64_t last_row = p.in[1] * (range + 1) / ranges;
      int64_t next_row = p.in[1] * range / ranges;
      const Range sources = sources_of(p.window[1], next_row, last_row, p.out[1], true);
      ColumnSums<T> sums{layout, sources.begin, scratch.data()};
      fill(scratch.data(), p.c * layout.channel(), Acc{0});
      do {
        const int64_t taken = least(band, sources.end - sums.first);
        for (int64_t i = 0; i < slices; ++i) {
          const int64_t slice = source_of(p.window[0], d, i, p.out[0], true);
          if (slice < 0) continue;
          const T* const from =
              gy + image * p.k * p.out_positions() + (slice * p.out[1] + sums.first) * p.out[2];
          const Acc* const weights = packed.data() + (group * slices + i) * rows * p.k;
          const int64_t positions = taken * p.out[2];
          in_steps<kColumnVectors>(
              ceil_div(positions, kLanes<T>), [&](auto of_tile, int64_t vector) {
                constexpr int kVectors = decltype(of_tile)::value;
                const int64_t at = vector * kLanes<T>;
                for (int64_t k = 0; k < p.k; ++k)
                  for (int64_t v = 0; v < kVectors; ++v)
                    store_vec(block.data() + k * kWidth + v * kLanes<T>,
                              load_lanes(from + k * p.out_positions() + at + v * kLanes<T>,
                                         positions - at - v * kLanes<T>));
                int64_t asked = 0;  // vectors of the next tile, one for each tile of rows
                for_equal_parts<kColumnRows>(rows, [&](auto of_rows, int64_t row) {
                  constexpr int kRows = decltype(of_rows)::value;
                  const int64_t part = ceil_div(p.k, ceil_div(p.k, kColumnTerms));
                  const bool asks = asked < kColumnVectors;
                  const T* const next = asks ? from + at + kWidth + asked++ * kLanes<T> : from + at;
                  const int64_t step = asks ? p.out_positions() : 0;
                  for (int64_t k = 0; k < p.k; k += part)
                    column_scatter<kRows, kVectors>(block.data() + k * kWidth, least(part, p.k - k),
                                                    weights + row * p.k + k * kRows,
                                                    offsets.data() + row, scratch.data() + at,
                                                    positions - at, next + k * step, step);
                });
              });
        }
        const bool ends = sums.first + band >= sources.end;
        const int64_t reached = (sums.first + band) * p.window[1].stride - p.window[1].padding;
        for (const int64_t stop = ends ? last_row : least(reached, last_row); next_row < stop;
             ++next_row) {
          const Acc* const from = sums.row(p.window[1], next_row);
          for (int64_t c = 0; c < p.c; ++c) {
            const int64_t channel = group * p.c + c;
            join_columns(lines, layout.columns,
                         from != nullptr ? from + c * layout.channel() : nullptr, layout.column(),
                         bias != nullptr ? widen(bias[channel]) : Acc{0},
                         gx + (((image * p.c + c) * p.in[0] + d) * p.in[1] + next_row) * p.in[2]);
          }
        }
        sums.carry(p.c);
      } while (sums.first < sources.end);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
