// Weight gradients of depthwise convolution of contiguous tensors on CPU: vectors along W, shared
// between rows.
//
// A task is one channel of a chunk of images. As in conv_rows.h, a band of source rows lies in
// scratch, padded and split by phases; so do the gradient's rows, with zeros past their ends. A
// tile holds the sums of a few places of a few window columns as vectors. For each few rows of the
// gradient, held in registers, a row of the source is loaded once, shifted to each window column,
// and meets every row of the gradient that some place pairs it with. Sums join the task's totals
// after each band and are folded at the end, which keeps chains of additions short. Bound: as
// there.
#pragma once

#include "conv/conv_row_taps.h"

namespace weft::WEFT_TARGET {
namespace {

inline constexpr int kGradientRows = 4;
#if defined(__AVX512F__)
inline constexpr int kWgradSums = 12;
#else
inline constexpr int kWgradSums = 6;
#endif
// Window columns of a tile with so many places in each.
template <int places>
inline constexpr int kWgradColumns = places >= 4   ? kWgradSums / places
                                     : places == 1 ? 4
                                                   : 3;

// The last vector of a row, which has `left` columns; all others are zero.
template <class Acc>
WEFT_INLINE Vec<Acc> first_lanes(Vec<Acc> value, int64_t left) {
  using Mask = typename LaneMask<Acc>::type;
  typename vector_of<Mask>::type lane;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(Acc)); ++i) lane[i] = i;
  return lane < static_cast<Mask>(left) ? value : Vec<Acc>{};
}

// Planes of some images in scratch, `step` apart, with rows `pitch` apart.
template <class Acc>
struct HeldPlanes {
  const Acc* data;
  int64_t step;
  int64_t pitch;
};

// totals[place] += x · gy over `images` × `rows` × `columns`, for kPlaces places of kColumns taps.
// What x holds past the columns meets zeros of gy, but may be infinite.
template <class Acc, int kPlaces, int kColumns>
void row_wgrad_tile(const ColumnTap* taps, int64_t images, Range rows, int64_t columns,
                    HeldPlanes<Acc> x, HeldPlanes<Acc> gy, Acc* totals) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Vec<Acc> sum[kColumns][kPlaces] = {};
  const auto add = [&](auto n, auto full, int64_t row, int64_t at) __attribute__((always_inline)) {
    constexpr int kRows = decltype(n)::value;
    const Acc* from[kColumns];
#pragma GCC unroll 8
    for (int t = 0; t < kColumns; ++t) from[t] = x.data + taps[t].source + row * x.pitch + at;
    Vec<Acc> g[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) g[r] = load_vec(gy.data + (row + r) * gy.pitch + at);
#pragma GCC unroll 16
    for (int s = 0; s < kRows + kPlaces - 1; ++s) {
#pragma GCC unroll 8
      for (int t = 0; t < kColumns; ++t) {
        Vec<Acc> value = in_register(load_vec(from[t]));
        from[t] = computed(from[t] + x.pitch);
        if constexpr (decltype(full)::value == 0) value = first_lanes<Acc>(value, columns - at);
#pragma GCC unroll 8
        for (int j = 0; j < kPlaces; ++j)
          if (s - j >= 0 && s - j < kRows) sum[t][j] += value * g[s - j];
      }
    }
  };
  const int64_t whole = columns - columns % kCount;
  const auto walk = [&](auto row_count, int64_t row) __attribute__((always_inline)) {
    for (int64_t column = 0; column < whole; column += kCount)
      add(row_count, Count<1>{}, rows.begin + row, column);
    if (whole < columns) add(row_count, Count<0>{}, rows.begin + row, whole);
  };
  for (; images > 0; --images, x.data += x.step, gy.data += gy.step)
    in_steps<kGradientRows>(rows.end - rows.begin, walk);
  for (int t = 0; t < kColumns; ++t)
    for (int j = 0; j < kPlaces; ++j) {
      Acc* const to = totals + (taps[t].weight + j * taps[t].step) * kCount;
      store_vec(to, load_vec(to) + sum[t][j]);
    }
}

// One channel of some images, `step` apart. Those that follow lie `ahead` of them.
template <class T>
struct ImagePlanes {
  const T* data;
  int64_t step;
  int64_t ahead;
};

// wgrad of one channel: the sums of one band after another, each over some images.
template <class T>
class RowWgrad {
 public:
  using Acc = accumulate_t<T>;

  explicit RowWgrad(const ConvProblem& p)
      : p_(p),
        g_(fprop_gather(p)),
        taps_(p),
        pitch_(round_up(p.out[2], kLane)),
        totals_(p.window_elements() * kLane) {}

  void clear() {
    fill(totals_.data(), p_.window_elements() * kLane, Acc{0});
    bias_ = Vec<Acc>{};
  }

  // The band: rows [first, first + rows) of slice `d` of the gradient.
  void reset(int64_t d, int64_t first, int64_t rows) {
    if (d == slice_ && first == first_) return;
    slice_ = d;
    first_ = first;
    rows_ = rows;
    source_.reset(p_, g_, d, first, first + rows, 2 * kLane);
    gradient_.resize(source_.held() * rows * pitch_);
    taps_.clear();
    runs_ = taps_.list(p_, g_, source_.planes(), d,
                       axis_phase(p_.window[1], first, first + rows, 0, false),
                       axis_phase(p_.window[2], 0, p_.out[2], 0, false));
  }

  // How many images are added at a time.
  int64_t held() const { return source_.held(); }

  // Adds one channel of `images` images.
  void add(ImagePlanes<T> x, ImagePlanes<T> gy, int64_t images) {
    const int64_t band = (slice_ * p_.out[1] + first_) * p_.out[2];
    for (int64_t i = 0; i < images; ++i, x.data += x.step, gy.data += gy.step) {
      source_.load(p_, g_, x.data, i, x.data + x.ahead);
      const T* from = gy.data + band;
      Acc* to = gradient_.data() + i * rows_ * pitch_;
      for (int64_t row = 0; row < rows_; ++row, from += p_.out[2], to += pitch_) {
        for (int64_t at = 0; at < p_.out[2]; at += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(from + gy.ahead + at, 0, 2);
        copy_row_whole(to, from, p_.out[2]);
      }
    }
    for (const TapRun* run = runs_.begin; run != runs_.end; ++run)
      with_count<kWindowRows>(run->places,
                              [&](auto n) { add_run<decltype(n)::value>(*run, images); });
  }

  // Adds to the bias's gradient what `add` has just taken.
  void add_bias(int64_t images) {
    constexpr int64_t kChain = 16, kChains = 4;
    const int64_t vectors = images * rows_ * pitch_ / kLane;
    Vec<Acc> total = {};
    for (int64_t run = 0; run < vectors; run += kChain * kChains) {
      Vec<Acc> sum[kChains] = {};
      const int64_t end = least(run + kChain * kChains, vectors);
      int64_t i = run;
      for (; i + kChains <= end; i += kChains)
        for (int64_t j = 0; j < kChains; ++j) sum[j] += load_vec(gradient_.data() + (i + j) * kLane);
      for (; i < end; ++i) sum[0] += load_vec(gradient_.data() + i * kLane);
      total += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    bias_ += total;
  }

  // gw, and then gb.
  void store(Acc* sums) const {
    for (int64_t place = 0; place < p_.window_elements(); ++place)
      sums[place] = sum_of_lanes<Acc>(load_vec(totals_.data() + place * kLane));
    sums[p_.window_elements()] = sum_of_lanes<Acc>(bias_);
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;

  template <int kPlaces>
  void add_run(const TapRun& run, int64_t images) {
    const HeldPlanes<Acc> x = {source_.data(0), source_.planes().channel(), source_.planes().pitch};
    const HeldPlanes<Acc> gy = {gradient_.data(), rows_ * pitch_, pitch_};
    const ColumnTap* const end = run.taps + run.count;
    for (const ColumnTap* first = run.taps; first != end;) {
      const ColumnTap* last = first;  // taps of the same rows
      while (last != end && last->rows.begin == first->rows.begin &&
             last->rows.end == first->rows.end)
        ++last;
      const Range rows = {most(0, first->rows.begin), least(rows_, first->rows.end)};
      if (rows.begin < rows.end)
        in_steps<kWgradColumns<kPlaces>>(last - first, [&](auto columns, int64_t at) {
          row_wgrad_tile<Acc, kPlaces, decltype(columns)::value>(first + at, images, rows,
                                                                 p_.out[2], x, gy, totals_.data());
        });
      first = last;
    }
  }

  const ConvProblem& p_;
  const Gather g_;
  RowBand<T> source_;
  RowTaps taps_;
  RowTaps::Runs runs_{};
  int64_t slice_ = -1, first_ = 0, rows_ = 0;
  int64_t pitch_;
  Scratch<Acc> gradient_;  // [image, row, pitch], with zeros past the ends of rows
  Scratch<Acc> totals_;    // [place, lane]
  Vec<Acc> bias_{};
};

template <class T>
void wgrad_rows(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements();
  const int64_t band = band_rows(p, fprop_gather(p), kBandElements);
  const int64_t chunks = image_chunks(p.n, p.groups);
  const int64_t sums = places + 1;  // of a task
  Scratch<Acc> partial(chunks * p.groups * sums);
  parallel_for(context, chunks * p.groups, 1, [&](int64_t begin, int64_t end) {
    RowWgrad<T> wgrad(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % p.groups, chunk = task / p.groups;
      const int64_t first = p.n * chunk / chunks, last = p.n * (chunk + 1) / chunks;
      wgrad.clear();
      for (int64_t d = 0; d < p.out[0]; ++d)
        for (int64_t row = 0; row < p.out[1]; row += band) {
          wgrad.reset(d, row, least(band, p.out[1] - row));
          for (int64_t n = first; n < last; n += wgrad.held()) {
            const int64_t images = least(wgrad.held(), last - n);
            const bool more = n + images < last;
            const int64_t plane = n * p.groups + channel;
            // To the next images, or to the next channel's first.
            const int64_t ahead = more              ? images * p.groups
                                  : task + 1 == end ? 0
                                                    : (first - n) * p.groups + 1;
            wgrad.add({x + plane * p.in_positions(), p.groups * p.in_positions(),
                       ahead * p.in_positions()},
                      {gy + plane * p.out_positions(), p.groups * p.out_positions(),
                       ahead * p.out_positions()},
                      images);
          }
        }
      wgrad.store(partial.data() + task * sums);
    }
  });
  for (int64_t channel = 0; channel < p.groups; ++channel)
    for (int64_t place = 0; place < places; ++place) {
      Acc sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum += partial[(chunk * p.groups + channel) * sums + place];
      gw[channel * places + place] = narrow<T>(sum);
    }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
