// What goes into the sums of conv_column_tiles.h: runs of a window's places, the products of their
// inputs and weights, and where all of them lie in scratch.
#pragma once

#include "conv/conv_columns.h"
#include "gemm/pack_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

namespace tile {

using V = Vec<float>;

inline constexpr int kPoints = 4;  // of an axis
inline constexpr int64_t kLane = kLanes<float>;
inline constexpr int kRows = kColumnRows;  // output channels at a time
#if defined(__AVX512F__)
inline constexpr int kVectors = 2;
#else
inline constexpr int kVectors = 3;
#endif
static_assert(kRows * kVectors <= kPoints * kPoints);  // outputs are made one for each point
// Not a power of two: points would share cache lines' places.
inline constexpr int64_t kPointStep = (kRows * kVectors + 1) * kLane;

// The point of each product of a run.
inline constexpr int kPointOf[4][kPoints] = {{}, {0, 3}, {0, 1, 3}, {0, 1, 2, 3}};

// Places first, first + stride, ... of a window, and where the places + 1 inputs are that two
// outputs read there.
struct Run {
  int64_t places;
  int64_t first;
  int64_t at[4];
};

// Cuts a window into runs; `offset_of`: of an input, counted from the tile's first.
template <class OffsetOf>
int64_t cut_window(const Window& w, const OffsetOf& offset_of, Run* runs) {
  int64_t count = 0;
  for (int64_t phase = 0; phase < w.stride && phase < w.size; ++phase) {
    int64_t left = ceil_div(w.size - phase, w.stride);
    for (int64_t first = phase; left > 0; ++count) {
      Run& run = runs[count];
      run.places = least(left, column_tiles::kRun);
      run.first = first;
      for (int64_t i = 0; i <= run.places; ++i) run.at[i] = offset_of(first + i * w.stride);
      left -= run.places, first += run.places * w.stride;
    }
  }
  return count;
}

// What the products of a run take of its inputs: load(i) gives input i, store(i, value) takes that
// of product i.
template <class Load, class Store>
WEFT_INLINE void source_products(int64_t places, const Load& load, const Store& store) {
  if (places == 3) {
    const V a = load(0), b = load(1), c = load(2), d = load(3);
    store(0, a - c), store(1, b + c), store(2, c - b), store(3, d - b);
  } else if (places == 2) {
    const V a = load(0), b = load(1), c = load(2);
    store(0, a - b), store(1, b), store(2, c - b);
  } else {
    store(0, load(0)), store(1, load(1));
  }
}
// And of its weights.
template <class Load, class Store>
WEFT_INLINE void weight_products(int64_t places, const Load& load, const Store& store) {
  if (places == 3) {
    const V a = load(0), c = load(2), ends = 0.5f * (a + c), middle = 0.5f * load(1);
    store(0, a), store(1, ends + middle), store(2, ends - middle), store(3, c);
  } else if (places == 2) {
    const V a = load(0), b = load(1);
    store(0, a), store(1, a + b), store(2, b);
  } else {
    const V a = load(0);
    store(0, a), store(1, a);
  }
}

// Two outputs of the sums at the points of an axis.
template <class Load>
WEFT_INLINE void outputs_of(const Load& load, V& first, V& second) {
  const V one = load(1), minus_one = load(2);
  first = load(0) + one + minus_one;
  second = one - minus_one + load(3);
}

// What all tasks share of a problem: runs of both axes, copies in scratch, the order of the terms.
struct Scheme {
  ConvProblem grid;
  ColumnRows band;
  int64_t row_products, column_products, terms;
  int64_t row_runs, column_runs;
  Scratch<Run> rows, columns;
  int64_t of_point[kPoints * kPoints];  // terms
  Scratch<int64_t> place;  // of [(channel, column product), row product] among the terms

  Scheme(const ConvProblem& p, int64_t band_rows)
      : grid(column_tiles::grid(p)),
        band(column_rows(grid, band_rows, kLane)),
        row_products(column_tiles::products(p.window[1])),
        column_products(column_tiles::products(p.window[2])),
        terms(column_tiles::terms(p)),
        rows(row_products),
        columns(column_products),
        place(terms) {
    band.columns = column_products;
    row_runs = cut_window(
        p.window[1], [&](int64_t at) { return band.row_offset(grid.window[1], at); }, rows.data());
    column_runs = cut_window(p.window[2], [](int64_t at) { return at; }, columns.data());
    int64_t next = 0;
    for (int row = 0; row < kPoints; ++row)
      for (int column = 0; column < kPoints; ++column) {
        const int64_t first = next;
        for (int64_t c = 0; c < p.c; ++c)
          each_at(columns, column_runs, column, [&](int64_t j) {
            each_at(rows, row_runs, row, [&](int64_t i) {
              place[(c * column_products + j) * row_products + i] = next++;
            });
          });
        of_point[row * kPoints + column] = next - first;
      }
  }

  // Calls body(product) for the products at a point.
  template <class Body>
  static void each_at(const Scratch<Run>& runs, int64_t count, int point, const Body& body) {
    for (int64_t i = 0, product = 0; i < count; ++i)
      for (int64_t j = 0; j <= runs[i].places; ++j, ++product)
        if (kPointOf[runs[i].places][j] == point) body(product);
  }
};

// The weights [channel, c, place] of kCount channels as [term, channel].
template <int kCount>
void pack_weights(const ConvProblem& p, const Scheme& s, const float* weights, float* packed) {
  static_assert(kCount <= kLane);
  const Window &rows = p.window[1], &columns = p.window[2];
  const int64_t places = p.window_elements(), row = s.column_products * kLane;
  Scratch<float> lanes(p.c * places * kLane), turned(rows.size * row);  // along the columns
  pack_vector(weights, 1, p.c * places, kCount, p.c * places, 1, lanes.data());
  const int64_t* place = s.place.data();
  for (int64_t c = 0; c < p.c; ++c) {
    for (int64_t j = 0; j < rows.size; ++j) {
      float* to = turned.data() + j * row;
      for (int64_t i = 0; i < s.column_runs; ++i) {
        const Run& run = s.columns[i];
        const float* from = lanes.data() + (c * places + j * columns.size + run.first) * kLane;
        weight_products(
            run.places,
            [&](int64_t at) __attribute__((always_inline)) {
              return load_vec(from + at * columns.stride * kLane);
            },
            [&](int64_t product, V value)
                __attribute__((always_inline)) { store_vec(to + product * kLane, value); });
        to += (run.places + 1) * kLane;
      }
    }
    for (int64_t l = 0; l < s.column_products; ++l)
      for (int64_t i = 0; i < s.row_runs; ++i) {
        const Run& run = s.rows[i];
        const float* const from = turned.data() + run.first * row + l * kLane;
        weight_products(
            run.places,
            [&](int64_t at)
                __attribute__((always_inline)) { return load_vec(from + at * rows.stride * row); },
            [&](int64_t product, V value) __attribute__((always_inline)) {
              store_part(packed + place[product] * kCount, value, kCount);
            });
        place += run.places + 1;
      }
  }
}

// The copies that the band of tiles from row `first` on reads of a channel.
inline void copy_rows(const ConvProblem& p, const Scheme& s, int64_t first, const float* channel,
                      PhaseLines<float>& lines, float* out) {
  const ColumnRows& band = s.band;
  for (int64_t phase = 0; phase < band.phases; ++phase) {
    float* to = out + phase * band.plane();
    int64_t h = s.grid.window[1].first_input(first) + phase;
    for (int64_t row = 0; row < band.extent; ++row, to += band.width, h += band.phases) {
      if (h < 0 || h >= p.in[1]) {
        for (int64_t l = 0; l < band.columns; ++l) fill(to + l * band.column(), band.width, 0.0f);
        continue;
      }
      split_lines(channel + h * p.in[2], lines);
      float* product = to;
      for (int64_t i = 0; i < s.column_runs; ++i) {
        const Run& run = s.columns[i];
        const float* from[4] = {};
        for (int64_t at = 0; at <= run.places; ++at) from[at] = lines.column[run.at[at]];
        for (int64_t at = 0; at < band.width; at += kLane)
          source_products(
              run.places,
              [&](int64_t input)
                  __attribute__((always_inline)) { return load_vec(from[input] + at); },
              [&](int64_t j, V value) __attribute__((always_inline)) {
                store_vec(product + j * band.column() + at, value);
              });
        product += (run.places + 1) * band.column();
      }
    }
  }
}

// The source of all terms for kCount vectors of tiles: [term, vector].
template <int kCount>
void make_terms(const ConvProblem& p, const Scheme& s, const float* copies, float* out) {
  const int64_t* place = s.place.data();
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t l = 0; l < s.column_products; ++l) {
      const float* const column = copies + c * s.band.channel() + l * s.band.column();
      for (int64_t i = 0; i < s.row_runs; ++i) {
        const Run& run = s.rows[i];
        for (int v = 0; v < kCount; ++v)
          source_products(
              run.places,
              [&](int64_t input) __attribute__((always_inline)) {
                return load_vec(column + run.at[input] + v * kLane);
              },
              [&](int64_t j, V value) __attribute__((always_inline)) {
                store_vec(out + (place[j] * kCount + v) * kLane, value);
              });
        place += run.places + 1;
      }
    }
}

}  // namespace tile

}  // namespace
}  // namespace weft::WEFT_TARGET
