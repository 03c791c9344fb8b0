// Small windows in conv_rows.h: a few vectors of columns, down the rows of a band.
//
// Where all places of a window are one run of taps, its weights stay in registers, and each row of
// scratch is loaded once, at each tap's column, for all the destination rows that it meets: their
// sums go around in registers, one finished by each row. P places and M columns need M loads for
// P · M products, without a tile's begin and end.
#pragma once

#include "conv/conv_row_tile.h"

namespace weft::WEFT_TARGET {
namespace {

// Of at most so many places a tap, and so many taps.
inline constexpr int kStreamPlaces = 3;
inline constexpr int kStreamTaps = 3;

inline bool streams_rows(const RowTaps::Runs& runs) {
  return runs.end - runs.begin == 1 && runs.begin->places <= kStreamPlaces &&
         runs.begin->count <= kStreamTaps;
}

// What is asked for meanwhile: the same columns of rows that come later.
template <class T>
struct RowsAhead {
  const T* data;
  int64_t step;
};

template <class T, int kPlaces, int kTaps, int kVectors>
class RowStream {
 public:
  using Acc = accumulate_t<T>;

  RowStream(const TapRun& run, const Acc* source, int64_t pitch, const Acc* weights, Acc start)
      : source_(source), pitch_(pitch), start_(Vec<Acc>{} + start) {
    for (int t = 0; t < kTaps; ++t) {
      from_[t] = run.taps[t].source;
      for (int j = 0; j < kPlaces; ++j)
        weight_[t][j] = Vec<Acc>{} + weights[run.taps[t].weight + j * run.taps[t].step];
    }
  }

  // `rows` destination rows from the first on.
  WEFT_INLINE void run(int64_t rows, RowSums<Acc> to, RowsAhead<T> ahead) {
    const int64_t steps = rows + kPlaces - 1;
    int64_t s = 0;
    const auto step = [&](auto phase, bool finished) __attribute__((always_inline)) {
      constexpr int kPhase = decltype(phase)::value;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(ahead.data + v * kLanes<T>, 0, 2);
        sum_[kPhase][v] = start_;
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vec<Acc> x = in_register(load_vec(source_ + from_[t] + v * kLanes<T>));
#pragma GCC unroll 4
          for (int j = 0; j < kPlaces; ++j)
            sum_[(kPhase + kPlaces - j) % kPlaces][v] += weight_[t][j] * x;
        }
      source_ += pitch_;
      ahead.data += ahead.step;
      if (!finished) return;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Acc* const at = to.out + v * kLanes<T>;
        const Vec<Acc> sum = sum_[(kPhase + 1) % kPlaces][v];
        if (v + 1 < kVectors)
          store_vec(at, sum);
        else
          store_lanes(at, sum, to.lanes - v * kLanes<T>);
      }
      to.out += to.step;
    };
    // Sums of kPlaces destination rows are under way, the row's own being that of `phase`.
    if constexpr (kPlaces > 1) step(Count<0>{}, false), ++s;
    if constexpr (kPlaces > 2) step(Count<1>{}, false), ++s;
    constexpr int kFirst = kPlaces - 1;
    for (; s + kPlaces <= steps; s += kPlaces) {
      step(Count<kFirst>{}, true);
      if constexpr (kPlaces > 1) step(Count<(kFirst + 1) % kPlaces>{}, true);
      if constexpr (kPlaces > 2) step(Count<(kFirst + 2) % kPlaces>{}, true);
    }
    if (s++ < steps) step(Count<kFirst>{}, true);
    if (s < steps) step(Count<(kFirst + 1) % kPlaces>{}, true);
  }

 private:
  const Acc* source_;
  int64_t pitch_;
  Vec<Acc> start_;
  int64_t from_[kTaps];
  Vec<Acc> weight_[kTaps][kPlaces];
  Vec<Acc> sum_[kPlaces][kVectors] = {};
};

template <class T, int kPlaces, int kTaps, int kVectors>
__attribute__((noinline)) void stream_rows(const TapRun& run, const accumulate_t<T>* source,
                                           int64_t pitch, int64_t rows,
                                           const accumulate_t<T>* weights,
                                           const RowSums<accumulate_t<T>>& to,
                                           const RowsAhead<T>& ahead) {
  RowStream<T, kPlaces, kTaps, kVectors>(run, source, pitch, weights, to.start)
      .run(rows, to, ahead);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
