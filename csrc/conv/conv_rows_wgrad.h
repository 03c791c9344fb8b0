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

#include "conv/conv_bias_grad.h"
#include "conv/conv_row_stream_wgrad.h"

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
      : p_(p), g_(fprop_gather(p)), taps_(p), pitch_(round_up(p.out[2], kLane)) {}

  // The band: rows [first, first + rows) of slice `d` of the gradient.
  void reset(int64_t d, int64_t first, int64_t rows) {
    if (d == slice_ && first == first_) return;
    slice_ = d;
    first_ = first;
    rows_ = rows;
    source_.reset(p_, g_, d, first, first + rows, 2 * kLane);
    taps_.clear();
    runs_ = taps_.list(p_, g_, source_.planes(), d,
                       axis_phase(p_.window[1], first, first + rows, 0, false),
                       axis_phase(p_.window[2], 0, p_.out[2], 0, false));
    streams_ = true;
    for (const TapRun* run = runs_.begin; run != runs_.end; ++run)
      streams_ = streams_ && run->places <= kWgradStreamPlaces;
    if (!streams_) gradient_.resize(source_.held() * rows * pitch_);
  }

  // How many images are added at a time.
  int64_t held() const { return source_.held(); }

  // Adds one channel of `images` images to its totals [place, lane].
  void add(ImagePlanes<T> x, ImagePlanes<T> gy, int64_t images, Acc* totals) {
    for (int64_t i = 0; i < images; ++i, x.data += x.step)
      source_.load(p_, g_, x.data, i, x.data + x.ahead);
    gy.data += (slice_ * p_.out[1] + first_) * p_.out[2];
    if (gy.ahead != 0)
      for (int64_t i = 0; i < images; ++i) ask(gy.data + i * gy.step + gy.ahead);
    if (!streams_) copy_gradient(gy, images);
    for (const TapRun* run = runs_.begin; run != runs_.end; ++run)
      with_count<kWindowRows>(
          run->places, [&](auto n) { add_run<decltype(n)::value>(*run, gy, images, totals); });
  }

  // The same for the bias's gradient [lane].
  void add_bias(ImagePlanes<T> gy, int64_t images, Acc* total) {
    constexpr int64_t kRun = 16 * 4 * kLane;
    gy.data += (slice_ * p_.out[1] + first_) * p_.out[2];
    const int64_t count = rows_ * p_.out[2];
    for (int64_t n = 0; n < images; ++n, gy.data += gy.step) {
      Vec<Acc> image = {};
      for (int64_t run = 0; run < count; run += kRun)
        image += sum_of_run(gy.data + run, least(kRun, count - run));
      store_vec(total, load_vec(total) + image);
    }
  }

 private:
  static constexpr int64_t kLane = kLanes<T>;

  // Asks for the band of a plane of the gradient.
  void ask(const T* gy) const {
    for (int64_t at = 0; at < rows_ * p_.out[2]; at += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(gy + at, 0, 2);
  }

  // The gradient's rows, widened, with zeros past their ends.
  void copy_gradient(const ImagePlanes<T>& gy, int64_t images) {
    Acc* to = gradient_.data();
    for (int64_t i = 0; i < images; ++i)
      for (int64_t row = 0; row < rows_; ++row, to += pitch_)
        copy_row_whole(to, gy.data + i * gy.step + row * p_.out[2], p_.out[2]);
  }

  template <int kPlaces>
  void add_run(const TapRun& run, const ImagePlanes<T>& gy, int64_t images, Acc* totals) {
    const HeldPlanes<Acc> x = {source_.data(0), source_.planes().channel(), source_.planes().pitch};
    const ColumnTap* const end = run.taps + run.count;
    for (const ColumnTap* first = run.taps; first != end;) {
      const ColumnTap* last = first;  // taps of the same rows
      while (last != end && last->rows.begin == first->rows.begin &&
             last->rows.end == first->rows.end)
        ++last;
      const Range rows = {most(0, first->rows.begin), least(rows_, first->rows.end)};
      if (rows.begin < rows.end)
        in_steps<kWgradColumns<kPlaces>>(last - first, [&](auto columns, int64_t at) {
          constexpr int kColumns = decltype(columns)::value;
          if constexpr (kPlaces <= kWgradStreamPlaces)
            if (streams_)
              return stream_wgrad<T, kPlaces, kColumns>(first + at, images, rows, p_.out[2], x,
                                                        {gy.data, gy.step, p_.out[2]}, totals);
          row_wgrad_tile<Acc, kPlaces, kColumns>(first + at, images, rows, p_.out[2], x,
                                                 {gradient_.data(), rows_ * pitch_, pitch_},
                                                 totals);
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
  bool streams_ = false;   // gy is read where it lies
  Scratch<Acc> gradient_;  // [image, row, pitch], with zeros past the ends of rows
};

// Totals [count, lane] as sums [count].
template <class T>
void fold_lanes(const accumulate_t<T>* totals, int64_t count, accumulate_t<T>* sums) {
  for (int64_t i = 0; i < count; ++i)
    sums[i] = sum_of_lanes<accumulate_t<T>>(load_vec(totals + i * kLanes<T>));
}

template <class T>
void wgrad_rows(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements();
  const int64_t band = band_rows(p, fprop_gather(p), kBandElements);
  const int64_t chunks = image_chunks(p.n, p.groups);
  Scratch<Acc> partial(chunks * p.groups * places);
  parallel_for(context, chunks * p.groups, 1, [&](int64_t begin, int64_t end) {
    RowWgrad<T> wgrad(p);
    Scratch<Acc> totals(places * kLanes<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % p.groups, chunk = task / p.groups;
      const int64_t first = p.n * chunk / chunks, last = p.n * (chunk + 1) / chunks;
      fill(totals.data(), places * kLanes<T>, Acc{0});
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
                      images, totals.data());
          }
        }
      fold_lanes<T>(totals.data(), places, partial.data() + task * places);
    }
  });
  for (int64_t i = 0; i < p.groups * places; ++i) {
    Acc sum = partial[i];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += partial[chunk * p.groups * places + i];
    gw[i] = narrow<T>(sum);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
