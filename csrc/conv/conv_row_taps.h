// What the places of a window find in a band of rows in scratch: shared by conv_rows.h and
// conv_rows_wgrad.h.
//
// A band is the source of some destination rows of one plane, padded, widened and split by the
// stride's phases. Places of one column of the window that read neighbouring rows of scratch are
// one tap: such a row, loaded once at the tap's column, serves every destination row that one of
// the places pairs it with.
#pragma once

#include "conv/conv_bands.h"
#include "conv/conv_registers.h"

namespace weft::WEFT_TARGET {
namespace {

// Places of a tap: their weights are held in registers.
#if defined(__AVX512F__)
inline constexpr int kWindowRows = 5;
#else
inline constexpr int kWindowRows = 3;
#endif
inline constexpr int64_t kBandElements = 8 * 1024;

// Neighbouring places of a column of the window, at most kWindowRows, that read neighbouring rows
// of scratch: those from `first` + the destination row on.
struct RowChunk {
  int64_t phase;  // of the rows
  int64_t first;
  int64_t places;
  int64_t j;       // the first place
  int64_t j_step;  // to the next one
};

// The chunks of one phase. Returns how many there are.
inline int64_t list_chunks(const ConvProblem& p, const Planes& planes, const AxisPhase& rows,
                           bool transposed, RowChunk* chunks) {
  const Window& window = p.window[1];
  int64_t count = 0;
  for (int64_t row_phase = 0; row_phase < planes.rows.phases; ++row_phase) {
    const int64_t begin = count;
    for (int64_t step = 0; step < window.size; ++step) {
      // Rows of scratch ascend with the place for fprop, against it for dgrad.
      const int64_t j = transposed ? window.size - 1 - step : step;
      int64_t phase, at;
      if (!place_in_scratch(window, planes.rows, rows, j, transposed, &phase, &at) ||
          phase != row_phase)
        continue;
      if (count > begin && chunks[count - 1].places < kWindowRows &&
          chunks[count - 1].first + chunks[count - 1].places == at) {
        RowChunk& last = chunks[count - 1];
        if (last.places++ == 1) last.j_step = j - last.j;
      } else {
        chunks[count++] = {phase, at, 1, j, 0};
      }
    }
  }
  return count;
}

// A chunk of one column of one slice of the window.
struct ColumnTap {
  int64_t source;  // in scratch, for destination row 0, column 0
  int64_t weight;  // of the first place
  int64_t step;    // from place to place among the weights
  Range rows;      // destination rows that it brings more than zeros
};

// Taps of equally many places.
struct TapRun {
  const ColumnTap* taps;
  int64_t count;
  int64_t places;
};

// The taps of a band's phases.
class RowTaps {
 public:
  explicit RowTaps(const ConvProblem& p)
      : taps_(p.window_elements()), runs_(p.window_elements()), chunks_(p.window[1].size) {}

  void clear() { count_ = runs_count_ = 0; }

  struct Runs {
    const TapRun* begin;
    const TapRun* end;
  };
  // Those of one phase of slice `d`, in runs whose sums are short enough.
  Runs list(const ConvProblem& p, const Gather& g, const Planes& planes, int64_t d,
            const AxisPhase& rows, const AxisPhase& columns) {
    const int64_t chunk_count = list_chunks(p, planes, rows, g.transposed, chunks_.data());
    const TapRun* const begin = runs_.data() + runs_count_;
    for (int64_t places = kWindowRows; places > 0; --places) {
      int64_t first = count_;
      const auto close = [&] {
        if (count_ > first) runs_[runs_count_++] = {taps_.data() + first, count_ - first, places};
        first = count_;
      };
      for (int64_t i = 0; i < p.window[0].size; ++i) {
        const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
        if (slice < 0) continue;
        for (const RowChunk* c = chunks_.data(); c != chunks_.data() + chunk_count; ++c) {
          if (c->places != places) continue;
          for (int64_t l = 0; l < p.window[2].size; ++l) {
            int64_t phase, column;
            if (!place_in_scratch(p.window[2], planes.columns, columns, l, g.transposed, &phase,
                                  &column))
              continue;
            taps_[count_++] = {(slice - planes.slices.begin) * planes.slice() +
                                   (c->phase * planes.columns.phases + phase) * planes.plane() +
                                   c->first * planes.pitch + planes.margin + column,
                               (i * p.window[1].size + c->j) * p.window[2].size + l,
                               c->j_step * p.window[2].size, rows_met(planes, *c)};
            if ((count_ - first) * places >= 2 * kTerms) close();
          }
        }
      }
      close();
    }
    return {begin, runs_.data() + runs_count_};
  }

 private:
  // Destination rows for which a place of the chunk lies inside the source.
  static Range rows_met(const Planes& planes, const RowChunk& chunk) {
    const int64_t phases = planes.rows.phases;
    const int64_t lead = planes.rows.lead - chunk.phase;
    const int64_t from = ceil_div(most(planes.source_rows.begin + lead, 0), phases);
    const int64_t past = floor_div(planes.source_rows.end - 1 + lead, phases) + 1;
    return {from - chunk.first - chunk.places + 1, past - chunk.first};
  }

  Scratch<ColumnTap> taps_;
  Scratch<TapRun> runs_;
  Scratch<RowChunk> chunks_;
  int64_t count_ = 0, runs_count_ = 0;
};

// A band of a few planes in scratch, whose rows begin at aligned addresses.
template <class T>
class RowBand {
 public:
  using Acc = accumulate_t<T>;

  // Makes room for the source of destination rows [first, last) of slice `d`, of which a tile may
  // read `slack` elements past the columns' end.
  void reset(const ConvProblem& p, const Gather& g, int64_t d, int64_t first, int64_t last,
             int64_t slack) {
    planes_ = band_planes(p, g, d, first, last);
    const AxisLayout& columns = planes_.columns;
    const int64_t lead = columns.lead / columns.phases;
    planes_.margin = kLanes<T> - lead % kLanes<T>;
    const int64_t stored = planes_.margin + lead + (columns.phases > 1 ? 1 : 0) +
                           round_up(ceil_div(g.src[2], columns.phases), kLanes<T>);
    planes_.pitch = round_up(most(planes_.pitch, stored), kLanes<T>);
    held_ = most(1, least(kMostPlanes, kBandElements / most(planes_.channel(), 1)));
    const int64_t elements =
        held_ * planes_.channel() + planes_.pitch + planes_.margin + p.window[2].span() + slack;
    data_.resize(elements);
    fill(data_.data(), elements, Acc{0});
  }
  // How many planes it holds: a load that crosses what was just stored waits until that is in the
  // cache, so that small planes are all loaded before the first one is read.
  int64_t held() const { return held_; }
  void load(const ConvProblem& p, const Gather& g, const T* channel, int64_t at) {
    fill_planes(p, g, planes_, channel, data_.data() + at * planes_.channel());
  }
  // The same, while part by part the channel `next` is asked for.
  void load(const ConvProblem& p, const Gather& g, const T* channel, int64_t at, const T* next) {
    const Range rows = planes_.source_rows;
    const int64_t step = ceil_div(lines(g), most(rows.end - rows.begin, 1));
    fill_planes(p, g, planes_, channel, data_.data() + at * planes_.channel(),
                // Inlined: the compiler drops calls of a function that does nothing but prefetch.
                [&](int64_t row)
                    __attribute__((always_inline)) { ask(g, next, row - rows.begin, step); });
  }
  const Planes& planes() const { return planes_; }
  const Acc* data(int64_t at) const { return data_.data() + at * planes_.channel(); }

  // Where the band begins in a channel, in its first slice.
  int64_t begin(const Gather& g) const {
    return (planes_.slices.begin * g.src[1] + planes_.source_rows.begin) * g.src[2];
  }
  // Asks for part `part` of the band of a channel, in parts of `step` lines.
  WEFT_INLINE void ask(const Gather& g, const T* channel, int64_t part, int64_t step) const {
    const int64_t end = least(part * step + step, lines(g));
    for (int64_t slice = planes_.slices.begin; slice < planes_.slices.end; ++slice) {
      const T* const from = channel + (slice * g.src[1] + planes_.source_rows.begin) * g.src[2];
      for (int64_t i = part * step; i < end; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
    }
  }
  // Of one slice.
  WEFT_INLINE int64_t lines(const Gather& g) const {
    return (planes_.source_rows.end - planes_.source_rows.begin) * g.src[2] / kLine + 1;
  }

 private:
  static constexpr int64_t kMostPlanes = 8;
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

  Planes planes_{};
  int64_t held_ = 1;
  Scratch<Acc> data_;
};

}  // namespace
}  // namespace weft::WEFT_TARGET
