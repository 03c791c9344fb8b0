// All gradients of depthwise convolution with windows of 2 to 4 and stride 2, of contiguous tensors
// on CPU: rows of the input in pairs.
//
// The padding counted in, row and column 2·m + a of the input meet, at place k = a + 2·lag, row and
// column m − lag of gy: the same for gx and for gw. So a task walks down the pairs of rows of a
// plane: a run of two vectors of a row of x is unzipped into its two phases, multiplied into the
// sums of gw, which stay in registers, and the same few vectors of gy, multiplied by the weights,
// make both phases of gx, which are zipped and written. Nothing is copied to scratch. Only vectors
// at a row's ends are masked. Bound: bytes. Tried and lost: gx and gw one after the other over
// planes of scratch split by phases, which take three times as long.
#pragma once

#include "conv/conv_pairs.h"
#include "conv/conv_rows_backward.h"

namespace weft::WEFT_TARGET {
namespace {

// What the pairs of a plane are computed from.
template <class T>
struct PairGradients {
  const T* x;
  const T* gy;
  const accumulate_t<T>* weights;
  int64_t x_ahead, gy_ahead;  // what is asked for meanwhile
};

// A few pairs of rows: their gx, and the sums of gw and of gb.
template <class T, int kSize>
class RowPairs {
 public:
  using Acc = accumulate_t<T>;

  RowPairs(const PairMaps& maps, const PairGradients<T>& plane) : maps_(maps), plane_(plane) {}

  // `gx` is where the first row goes.
  WEFT_INLINE void run(Range pairs, T* gx) {
    const int64_t last = maps_.pairs(1), lead = maps_.padding[1];
    gx -= maps_.rows(pairs).begin * maps_.in[1];
    for (int64_t m = 0; m < last; m += kLane) {
      const bool whole = m >= kLags - 1 && 2 * m >= lead && m + kLane <= maps_.out[1] &&
                         2 * (m + kLane) <= maps_.in[1] + lead;
      if (whole)
        columns<true>(m, pairs, gx);
      else
        columns<false>(m, pairs, gx);
    }
  }

  // The sums join totals [place, lane], of gw and then of gb.
  WEFT_INLINE void join(Acc* totals) const {
#pragma GCC unroll 4
    for (int k = 0; k < kSize; ++k)
#pragma GCC unroll 4
      for (int l = 0; l < kSize; ++l) join(totals, k * kSize + l, sum_[k][l]);
    join(totals, kSize * kSize, bias_);
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;
  static constexpr int kLags = (kSize + 1) / 2;

  static WEFT_INLINE void join(Acc* totals, int64_t i, Vec<Acc> sum) {
    store_vec(totals + i * kLane, load_vec(totals + i * kLane) + sum);
  }

  // Column pairs [m, m + kLane), down the rows.
  template <bool kWhole>
  WEFT_INLINE void columns(int64_t m, Range pairs, T* gx) {
    const int64_t width = maps_.in[1], count = maps_.out[1];
    const int64_t first = maps_.padding[1] - 2 * m;
    const LaneSpan low(first, first + width, kLane);
    const LaneSpan high(first - kLane, first + width - kLane, kLane);
    const LaneSpan lag[] = {{-m, count - m, kLane}, {1 - m, count + 1 - m, kLane}};
    const auto load = [](const T* from, const LaneSpan& span) __attribute__((always_inline)) {
      return kWhole ? load_vec(from) : span.load(from);
    };
    const auto store = [](T* to, Vec<Acc> value, const LaneSpan& span)
                           __attribute__((always_inline)) {
                             if (kWhole)
                               store_vec(to, value);
                             else
                               span.store(to, value);
                           };

    const auto inside = [&](int64_t row) { return row >= 0 && row < maps_.out[0]; };
    const auto load_grads = [&](int64_t row, Vec<Acc>(&g)[kLags]) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int j = 0; j < kLags; ++j)
        g[j] = inside(row) ? load(plane_.gy + row * count + m - j, lag[j]) : Vec<Acc>{};
    };
    Vec<Acc> g[kLags][kLags];
    if constexpr (kLags > 1) load_grads(pairs.begin - 1, g[1]);
    for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
      load_grads(pair, g[0]);
      __builtin_prefetch(plane_.gy + pair * count + m + plane_.gy_ahead, 0, 2);
      bias_ += g[0][0];
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        const int64_t row = 2 * pair + a - maps_.padding[0];
        if (row < 0 || row >= maps_.in[0]) continue;
        const int64_t at = row * width - first;
        __builtin_prefetch(plane_.x + at + plane_.x_ahead, 0, 2);
        __builtin_prefetch(plane_.x + at + kLane + plane_.x_ahead, 0, 2);
        Vec<Acc> phase[2], sum[2] = {};
        deinterleave(load(plane_.x + at, low), load(plane_.x + at + kLane, high), phase[0],
                     phase[1]);
#pragma GCC unroll 2
        for (int i = 0; i < kLags; ++i) {
          if (a + 2 * i >= kSize || !inside(pair - i)) continue;
#pragma GCC unroll 4
          for (int l = 0; l < kSize; ++l) {
            sum[l % 2] += plane_.weights[(a + 2 * i) * kSize + l] * g[i][l / 2];
            // What has no gradient may be infinite.
            const Vec<Acc> value = kWhole ? phase[l % 2] : lag[l / 2].of(phase[l % 2]);
            sum_[a + 2 * i][l] += value * g[i][l / 2];
          }
        }
        Vec<Acc> front, back;
        interleave(sum[0], sum[1], front, back);
        store(gx + at, front, low);
        store(gx + at + kLane, back, high);
      }
      if constexpr (kLags > 1)
#pragma GCC unroll 2
        for (int j = 0; j < kLags; ++j) g[1][j] = g[0][j];
    }
  }

  const PairMaps maps_;
  const PairGradients<T> plane_;
  Vec<Acc> sum_[kSize][kSize] = {};
  Vec<Acc> bias_ = {};
};

template <class T, int kSize>
__attribute__((noinline)) void walk_pairs(const PairMaps& maps, Range pairs,
                                          const PairGradients<T>& plane, RowWriter<T>& writer,
                                          accumulate_t<T>* totals) {
  const int64_t step = pairs_together(2 * maps.in[1]);
  for (int64_t first = pairs.begin; first < pairs.end; first += step) {
    const Range few = {first, least(first + step, pairs.end)};
    RowPairs<T, kSize> rows(maps, plane);
    rows.run(few, writer.row());
    rows.join(totals);
    const Range written = maps.rows(few);
    writer.advance((written.end - written.begin) * maps.in[1]);
  }
}

template <class T>
class PairBackward {
 public:
  using Acc = accumulate_t<T>;

  // Runs of pairs: several tasks, whatever the number of threads.
  class Parts {
   public:
    explicit Parts(const ConvProblem& p)
        : pairs_(PairMaps(p).pairs(0)),
          count_(pair_parts(p.groups * image_chunks(p.n, p.groups), pairs_)) {}
    int64_t count() const { return count_; }
    Range part(int64_t i) const { return {pairs_ * i / count_, pairs_ * (i + 1) / count_}; }

   private:
    int64_t pairs_, count_;
  };

  // `p` has no activation, `activated` may have one.
  PairBackward(const ConvProblem& p, const ConvProblem& activated, const ConvGradients& t,
               const Acc* weights)
      : p_(p),
        maps_(p),
        t_(t),
        weights_(weights),
        sums_(p.window_elements() + 1),
        grads_(activated, t),
        writer_(nullptr, 2 * pairs_together(2 * p.in[2]) * p.in[2],
                conv_streams(p.in_elements() * size_of(p.dtype))),
        ahead_(planes_ahead(p)) {}

  void reset(Range pairs) {
    pairs_ = pairs;
    part_ = {{0, 0}, {0, 0}, {0, 1}, maps_.grads(pairs, (p_.window[1].size + 1) / 2)};
  }

  // Of `channels` of `images`, in the order of memory. The sums of gw, and then of gb, of each
  // channel go to `sums`.
  void run(Range channels, Range images, Acc* sums) {
    const int64_t totals = (channels.end - channels.begin) * sums_;
    if (totals > held_) totals_.resize((held_ = totals) * kLanes<T>);
    fill(totals_.data(), totals * kLanes<T>, Acc{0});
    for (int64_t n = images.begin; n < images.end; ++n)
      for (int64_t channel = channels.begin; channel < channels.end; ++channel)
        plane(n * p_.groups + channel, weights_ + channel * p_.window_elements(),
              totals_.data() + (channel - channels.begin) * sums_ * kLanes<T>);
    fold_lanes<T>(totals_.data(), totals, sums);
  }

 private:
  void plane(int64_t at, const Acc* weights, Acc* totals) {
    const T* const x = static_cast<const T*>(t_.x) + at * p_.in_positions();
    const T* const gy = grads_.of(part_, at, 1, 1);
    writer_.restart(static_cast<T*>(t_.gx) + at * p_.in_positions() +
                    maps_.rows(pairs_).begin * p_.in[2]);
    with_count<kMostPairWindow>(p_.window[1].size, [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      if constexpr (kSize > 1)
        walk_pairs<T, kSize>(
            maps_, pairs_,
            {x, gy, weights, ahead_ * p_.in_positions(), ahead_ * p_.out_positions()}, writer_,
            totals);
    });
  }

  const ConvProblem& p_;
  const PairMaps maps_;
  const ConvGradients& t_;
  const Acc* weights_;
  int64_t sums_;  // of a channel
  SumGradient<T> grads_;
  RowWriter<T> writer_;
  BackwardPart part_{};
  Range pairs_{};
  int64_t ahead_;  // planes
  int64_t held_ = 0;
  Scratch<Acc> totals_;  // [channel, place, lane]
};

}  // namespace
}  // namespace weft::WEFT_TARGET
