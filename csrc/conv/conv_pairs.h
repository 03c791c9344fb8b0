// fprop of depthwise convolution with windows of 2 to 4 and stride 2, of contiguous tensors on CPU:
// rows of the input in pairs.
//
// The padding counted in, place k = a + 2·lag of the window reads, for output m, row and column
// 2·(m + lag) + a of the input. So a task walks down the pairs of rows of a plane: a run of two
// vectors of a row is unzipped into its two phases in registers, each meets the outputs of its own
// pair and of the one before, and the next load brings the phases one place on. Nothing is copied
// to scratch. Only vectors at a row's ends are masked. Bound: bytes, which are asked for ahead.
// Tried and lost: planes of scratch split by phases (conv_rows.h), which other windows and targets
// without masks take: there, ends of rows that go by way of a buffer cost more than the scratch.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_lane_span.h"
#include "conv/conv_plan.h"
#include "core/row_writer.h"

namespace weft::WEFT_TARGET {
namespace {

// The maps of one plane, in pairs of rows and of columns.
struct PairMaps {
  explicit PairMaps(const ConvProblem& p)
      : in{p.in[1], p.in[2]},
        out{p.out[1], p.out[2]},
        padding{p.window[1].padding, p.window[2].padding} {}

  int64_t in[2], out[2], padding[2];

  // That hold all of the input and all of gy.
  int64_t pairs(int axis) const { return most(out[axis], ceil_div(in[axis] + padding[axis], 2)); }
  // Rows of the input that pairs [begin, end) hold.
  Range rows(Range pairs) const { return within(pairs, 2, padding[0], in[0]); }
  // Rows of gy that they meet.
  Range grads(Range pairs, int64_t lags) const {
    return within({pairs.begin - lags + 1, pairs.end}, 1, 0, out[0]);
  }

 private:
  static Range within(Range pairs, int64_t step, int64_t lead, int64_t extent) {
    const auto inside = [&](int64_t at) { return least(most(step * at - lead, 0), extent); };
    return {inside(pairs.begin), inside(pairs.end)};
  }
};

// How many pairs go together: those of a few KB, whose chains of additions are short.
inline int64_t pairs_together(int64_t columns) {
  constexpr int64_t kLeast = 4, kElements = 2048;
  return most(kLeast, kElements / columns);
}

// Parts of the pairs of a plane: several of all `tasks`, whatever the number of threads.
inline int64_t pair_parts(int64_t tasks, int64_t pairs) {
  constexpr int64_t kTasks = 8, kLeastPairs = 8;
  return most(1, least(ceil_div(kTasks, most(tasks, 1)), pairs / kLeastPairs));
}

// What the outputs of a plane are computed from.
template <class T>
struct PairSource {
  const T* x;
  const accumulate_t<T>* weights;
  accumulate_t<T> start;
  int64_t ahead;  // elements
};

// Output columns [m, m + kLanes) of output rows `rows`, down the pairs; `y` is that of row 0.
template <class T, int kSize, bool kWhole>
WEFT_INLINE void pair_columns(const PairMaps& maps, const PairSource<T>& from, int64_t m,
                              Range rows, T* y) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  constexpr int kLags = (kSize + 1) / 2;
  const int64_t width = maps.in[1], first = maps.padding[1] - 2 * m;
  const auto span = [&](int64_t skipped) {
    return LaneSpan(first - skipped, first - skipped + width, kLane);
  };
  const LaneSpan low[] = {span(0), span(2)}, high[] = {span(kLane), span(kLane + 2)};
  const LaneSpan out(0, maps.out[1] - m, kLane);
  const Vec<Acc> start = Vec<Acc>{} + from.start;
  Vec<Acc> sum = start;
  for (int64_t pair = rows.begin; pair < rows.end + kLags - 1; ++pair) {
    Vec<Acc> next = start;
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      const int64_t row = 2 * pair + a - maps.padding[0];
      if (row < 0 || row >= maps.in[0]) continue;
      const T* const x = from.x + row * width - first;
      __builtin_prefetch(x + from.ahead, 0, 2);
      __builtin_prefetch(x + from.ahead + kLane, 0, 2);
      Vec<Acc> phase[kLags][2];
#pragma GCC unroll 2
      for (int j = 0; j < kLags; ++j) {
        const T* const at = x + 2 * j;
        deinterleave(kWhole ? load_vec(at) : low[j].load(at),
                     kWhole ? load_vec(at + kLane) : high[j].load(at + kLane), phase[j][0],
                     phase[j][1]);
      }
#pragma GCC unroll 4
      for (int l = 0; l < kSize; ++l) {
        const Vec<Acc> value = phase[l / 2][l % 2];
        next += from.weights[a * kSize + l] * value;
        if (a + 2 < kSize) sum += from.weights[(a + 2) * kSize + l] * value;
      }
    }
    // The one before has met all its places.
    const int64_t done = pair - kLags + 1;
    const Vec<Acc> value = kLags > 1 ? sum : next;
    sum = next;
    if (done < rows.begin) continue;
    T* const to = y + done * maps.out[1] + m;
    if (kWhole)
      store_vec(to, value);
    else
      out.store(to, value);
  }
}

// Output rows `rows` of a plane.
template <class T, int kSize>
__attribute__((noinline)) void pair_rows(const ConvProblem& p, const PairMaps& maps,
                                         const PairSource<T>& from, Range rows,
                                         RowWriter<T>& writer) {
  constexpr int64_t kLane = kLanes<T>;
  constexpr int64_t kLags = (kSize + 1) / 2;
  const int64_t width = maps.out[1], step = pairs_together(2 * maps.in[1]);
  for (int64_t first = rows.begin; first < rows.end; first += step) {
    const Range few = {first, least(first + step, rows.end)};
    T* const to = writer.row();
    for (int64_t m = 0; m < width; m += kLane) {
      const bool whole = 2 * m >= maps.padding[1] && m + kLane <= width &&
                         2 * (m + kLane + kLags - 1) <= maps.in[1] + maps.padding[1];
      if (whole)
        pair_columns<T, kSize, true>(maps, from, m, few, to - first * width);
      else
        pair_columns<T, kSize, false>(maps, from, m, few, to - first * width);
    }
    const int64_t written = (few.end - few.begin) * width;
    activate_row(p, to, written);
    writer.advance(written);
  }
}

template <class T>
void gather_pairs(const ConvProblem& p, const T* x, const T* weights, const T* bias, T* y,
                  const Context& context) {
  const Widened<T> wide(weights, p.weight_elements(), context);
  const PairMaps maps(p);
  const int64_t planes = p.n * p.groups, parts = pair_parts(planes, p.out[1]);
  const int64_t ahead = planes_ahead(p) * p.in_positions();
  parallel_for(context, planes * parts, 1, [&](int64_t begin, int64_t end) {
    RowWriter<T> writer(nullptr, pairs_together(2 * p.in[2]) * p.out[2],
                        conv_streams(p.out_elements() * size_of(p.dtype)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / parts, part = task % parts, channel = plane % p.groups;
      const Range rows = {p.out[1] * part / parts, p.out[1] * (part + 1) / parts};
      const PairSource<T> from = {
          x + plane * p.in_positions(), wide.data() + channel * p.window_elements(),
          bias != nullptr ? widen(bias[channel]) : accumulate_t<T>{0}, ahead};
      writer.restart(y + plane * p.out_positions() + rows.begin * p.out[2]);
      with_count<kMostPairWindow>(p.window[1].size, [&](auto size) {
        constexpr int kSize = decltype(size)::value;
        if constexpr (kSize > 1) pair_rows<T, kSize>(p, maps, from, rows, writer);
      });
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
