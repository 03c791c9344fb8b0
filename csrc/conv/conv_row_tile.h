// The tile of conv_rows.h: a few destination rows × a few vectors in registers.
//
// R rows and M places of a tap need R + M − 1 loads for R · M products. Tried and lost: aligned
// loads joined by a shuffle at each tap's column, where a load that crosses a cache line costs two.
#pragma once

#include "conv/conv_row_taps.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kRowVectors = 4;
#else
inline constexpr int kRowVectors = 2;
#endif
// Destination rows of a tile: enough sums in flight to keep the FMA units busy.
template <int vectors>
inline constexpr int kTileRowsOf = vectors == 1 ? 8 : 4;

// Where a tile's sums go.
template <class Acc>
struct RowSums {
  Acc* out;
  int64_t step;   // from row to row
  int64_t lanes;  // of a row
  Acc start;      // what they begin with
};

// A tile's sums between two runs of taps: the output itself is not in the cache.
template <class Acc, int kVectors, int kRows>
struct KeptSums {
  Vec<Acc> at[kRows][kVectors];
};

// Sums of a run of taps of kPlaces places, for kRows rows of kVectors vectors, of which the first
// is destination row `row` of the phase; `source` is its place in scratch. It is the tile's `first`
// run, its `last` one.
template <class Acc, int kPlaces, int kVectors, int kRows>
__attribute__((noinline)) void add_taps(const TapRun& run, const Acc* source, int64_t pitch,
                                        int64_t row, const Acc* weights, bool first, bool last,
                                        KeptSums<Acc, kVectors, kRows>& kept,
                                        const RowSums<Acc>& to) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Vec<Acc> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<Acc>{} + (first ? to.start : Acc{0});
  for (const ColumnTap* tap = run.taps; tap != run.taps + run.count; ++tap) {
    if (tap->rows.begin >= row + kRows || tap->rows.end <= row) continue;
    const Acc* from = source + tap->source;
    Vec<Acc> weight[kPlaces];
#pragma GCC unroll 8
    for (int j = 0; j < kPlaces; ++j) weight[j] = Vec<Acc>{} + weights[tap->weight + j * tap->step];
#pragma GCC unroll 16
    for (int s = 0; s < kRows + kPlaces - 1; ++s, from = computed(from + pitch)) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec<Acc> x = in_register(load_vec(from + v * kCount));
#pragma GCC unroll 8
        for (int j = 0; j < kPlaces; ++j)
          if (s - j >= 0 && s - j < kRows) sum[s - j][v] += weight[j] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (!first) sum[r][v] += kept.at[r][v];
      if (last)
        store_lanes(to.out + r * to.step + v * kCount, sum[r][v], to.lanes - v * kCount);
      else
        kept.at[r][v] = sum[r][v];
    }
}

// All runs of a tile. There may be none.
template <class Acc, int kVectors, int kRows>
void row_tile(const RowTaps::Runs& runs, const Acc* source, int64_t pitch, int64_t row,
              const Acc* weights, const RowSums<Acc>& to) {
  KeptSums<Acc, kVectors, kRows> kept;
  const TapRun none{nullptr, 0, 1};
  const bool any = runs.begin != runs.end;
  const TapRun* const begin = any ? runs.begin : &none;
  const TapRun* const end = any ? runs.end : &none + 1;
  for (const TapRun* run = begin; run != end; ++run) {
    with_count<kWindowRows>(run->places, [&](auto n) __attribute__((always_inline)) {
      add_taps<Acc, decltype(n)::value, kVectors, kRows>(*run, source, pitch, row, weights,
                                                         run == begin, run + 1 == end, kept, to);
    });
  }
}

// How many tiles for_each_row_tile calls.
inline int64_t row_tiles(int64_t vectors, int64_t rows) {
  int64_t tiles = 0;
  in_steps<kRowVectors>(vectors, [&](auto width, int64_t) {
    tiles += ceil_div(rows, kTileRowsOf<decltype(width)::value>);
  });
  return tiles;
}

// Calls tile(Count<vectors>, Count<rows>, vector, row) so as to cover `vectors` × `rows`.
template <class Tile>
WEFT_INLINE void for_each_row_tile(int64_t vectors, int64_t rows, const Tile& tile) {
  in_steps<kRowVectors>(vectors, [&](auto width, int64_t vector) {
    constexpr int kMost = kTileRowsOf<decltype(width)::value>;
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      const int64_t step = ceil_div(left, ceil_div(left, kMost));
      with_count<kMost>(step, [&](auto height) { tile(width, height, vector, row); });
      row += step;
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
