// Weight gradients of channels-last tensors on CPU: vectors along the channels.
//
// A tile of weights of one place, broadcast channels × vectors of channels, is the sum of a run of
// pixels, from any rows and images, that read an input there; the wider side of the layer is the
// vectors'. A run's channels are copied to the first-level cache where they are halves or lie far
// apart, as words of two neighbouring pixels where the processor has products of bf16. Tasks are
// places × channels × chunks of rows, whose sums are added in order. Bound: FLOPs. Groups much
// narrower than a vector waste it. Tried and lost: words of two neighbouring images, which take a
// pass over both operands; tiles that walk along each row, short on small maps.
#pragma once

#include "conv/conv_gather.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kMaxVectors = 4;
#else
inline constexpr int kMaxVectors = 2;
#endif

// How a problem's pixels are walked.
struct WgradWalk {
  ConvProblem p;
  int64_t x_pixel;  // elements of x from pixel to pixel
  int64_t x_row;    // from row to row

  int64_t x_image() const { return p.in[0] * p.in[1] * x_row; }
  int64_t gy_image() const { return p.out_channels() * p.out_positions(); }
};

inline WgradWalk plain_walk(const ConvProblem& p) {
  return {p, p.in_channels(), p.in[2] * p.in_channels()};
}

// Few channels: where x has its columns' padding, a row of the window is one run of channels, and
// one place. The weights [K, T, R, S, C] are the same numbers in the same order.
inline bool folds(const ConvProblem& p) {
  return p.groups == 1 && p.c < 16 && p.window[2].dilation == 1 && p.window[2].size > 1;
}
inline WgradWalk folded_walk(const ConvProblem& p) {
  const Window& w = p.window[2];
  const int64_t last = w.stride * (p.out[2] - 1);
  WgradWalk walk = {p, p.c, most(w.padding + p.in[2], last + w.size) * p.c};
  walk.p.c = w.size * p.c;
  walk.p.in[2] = last + 1;  // where the windows begin
  walk.p.window[2] = {1, w.stride, 0, 1};
  return walk;
}

template <class T>
struct PixelOperands {
  const T* x;
  const T* gy;
};

// Terms of a weight's sum that are added up in registers; runs of runs are then added up, and those
// to the sum: short chains of additions.
inline constexpr int64_t kRunTerms = 64, kRunsJoined = 32;

// Where a run's terms have the channels of an operand.
template <class Acc>
struct RunTerms {
  const Acc* const* at;
  int64_t first;
};

// One operand of a run, of which terms of pairs are words.
template <bool kPairs, class T>
class RunOperand {
 public:
  using Acc = accumulate_t<T>;
  static constexpr int64_t kWord = kPairs ? 2 : 1;

  // Room for `channels` at a time; `pixel`: elements from one to the next.
  RunOperand(int64_t channels, int64_t pixel)
      : width_(round_up(channels, kLanes<T>)),
        // Pixels that lie further apart fall on the same lines of the first-level cache.
        direct_(std::is_same_v<T, Acc> && pixel <= kNearElements),
        copy_(width_ * kRunTerms) {}

  // `count` channels from `first` on of some pixels in ascending order, as whole vectors; `end`: of
  // the operand.
  RunTerms<Acc> load(const T* const* pixels, int64_t pixel_count, int64_t first, int64_t count,
                     const T* end) {
    if constexpr (std::is_same_v<T, Acc>) {
      if (direct_ && round_up(count, kLanes<T>) <= end - (pixels[pixel_count - 1] + first))
        return {pixels, first};
    }
    for (int64_t t = 0; t < pixel_count; t += kWord) {
      const T* const from = pixels[t] + first;
      Acc* const to = copy_.data() + t / kWord * width_;
      at_[t / kWord] = to;
      int64_t i = 0;
      if constexpr (kPairs)
        if (t + 1 < pixel_count)
          for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>)
            interleave_halves(from + i, pixels[t + 1] + first + i, to + i);
      for (; i < count; i += kLanes<T>)
        store_vec(to + i, term(pixels + t, pixel_count - t, first + i, count - i));
    }
    return {at_, 0};
  }

 private:
  static constexpr int64_t kNearElements = 128;

  // One vector of channels, of which there are `left`.
  static WEFT_INLINE Vec<Acc> term(const T* const* pixels, int64_t pixels_left, int64_t channel,
                                   int64_t left) {
    if constexpr (kPairs) {
      return load_pairs(pixels[0] + channel, pixels_left > 1 ? pixels[1] + channel : nullptr, left);
    } else {
      return load_lanes(pixels[0] + channel, left);
    }
  }

  int64_t width_;
  bool direct_;
  Scratch<Acc> copy_;
  const Acc* at_[kRunTerms];
};

// sums[i · sum_row + j] (+)= Σ a[i] · b[j] over the terms: Rows broadcast channels i of a, Vectors
// vectors of channels j of b.
template <bool kPairs, int Rows, int Vectors, class Acc>
__attribute__((noinline)) void wgrad_tile(const RunTerms<Acc>& a, const RunTerms<Acc>& b,
                                          int64_t terms, bool add, Acc* sums, int64_t sum_row) {
  Vec<Acc> sum[Rows][Vectors] = {};
#pragma GCC unroll 2
  for (int64_t t = 0; t < terms; ++t) {
    const Acc *const from_a = a.at[t] + a.first, *const from_b = b.at[t] + b.first;
    Vec<Acc> by[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) by[v] = load_vec(from_b + v * kLanes<Acc>);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const auto value = [&]() __attribute__((always_inline)) {
        if constexpr (kPairs) {
          return broadcast_word(from_a + i);
        } else {
          return from_a[i];
        }
      }();
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (kPairs) {
          add_pairs(sum[i][v], value, by[v]);
        } else {
          sum[i][v] += value * by[v];
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Acc* const to = sums + i * sum_row + v * kLanes<Acc>;
      store_vec(to, add ? load_vec(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// The sums of a block of broadcast channels by all lanes at one place.
template <bool kPairs, class T>
class BlockWgrad {
 public:
  using Acc = accumulate_t<T>;

  // `end`: of both operands.
  BlockWgrad(const WgradWalk& walk, bool broadcast_x, int64_t block, int64_t lanes,
             PixelOperands<T> end)
      : walk_(walk),
        broadcast_x_(broadcast_x),
        lanes_(lanes),
        sum_row_(round_up(lanes, kLanes<T>)),
        a_(block, broadcast_x ? walk.x_pixel : walk.p.out_channels()),
        b_(least(lanes, kMaxVectors * kLanes<T>),
           broadcast_x ? walk.p.out_channels() : walk.x_pixel),
        sums_(block * sum_row_),
        x_end_(end.x),
        gy_end_(end.gy) {}

  // total [row, lane] (+)= those of some rows of pixels.
  void run(PixelOperands<T> operands, const int64_t (&offset)[3], Range pixel_rows, Range rows,
           bool add, Acc* total) {
    rows_ = rows;
    total_ = total;
    add_ = add;
    runs_ = 0;
    add_pixels(operands, offset, pixel_rows);
    if (runs_ > 0) join();
    if (!add_) fill(total, (rows.end - rows.begin) * sum_row_, Acc{0});
  }

 private:
  static constexpr int64_t kWord = RunOperand<kPairs, T>::kWord;
  static constexpr int64_t kPixels = kWord * kRunTerms;

  void add_pixels(PixelOperands<T> operands, const int64_t (&offset)[3], Range pixel_rows) {
    const ConvProblem& p = walk_.p;
    const Range columns = columns_inside(p.window[2], offset[2], p.in[2], p.out[2]);
    int64_t count = 0;
    for (int64_t row = pixel_rows.begin; row < pixel_rows.end; ++row) {
      const int64_t slice = row / p.out[1];
      const int64_t n = slice / p.out[0];
      const int64_t d = slice % p.out[0] * p.window[0].stride + offset[0];
      const int64_t h = row % p.out[1] * p.window[1].stride + offset[1];
      if (d < 0 || d >= p.in[0] || h < 0 || h >= p.in[1]) continue;
      const T* x = operands.x + n * walk_.x_image() + (d * p.in[1] + h) * walk_.x_row +
                   (columns.begin * p.window[2].stride + offset[2]) * walk_.x_pixel;
      const T* gy = operands.gy + (row * p.out[2] + columns.begin) * p.out_channels();
      const int64_t x_step = p.window[2].stride * walk_.x_pixel, gy_step = p.out_channels();
      for (int64_t left = columns.end - columns.begin; left > 0;) {
        const int64_t taken = least(left, kPixels - count);
        for (int64_t i = 0; i < taken; ++i) x_[count + i] = x + i * x_step;
        for (int64_t i = 0; i < taken; ++i) gy_[count + i] = gy + i * gy_step;
        x += taken * x_step, gy += taken * gy_step;
        left -= taken, count += taken;
        if (count < kPixels) continue;
        add_run(count);
        count = 0;
      }
    }
    if (count > 0) add_run(count);
  }

  void add_run(int64_t pixels) {
    const int64_t terms = ceil_div(pixels, kWord), rows = rows_.end - rows_.begin;
    const RunTerms<Acc> a = a_.load(broadcast_x_ ? x_ : gy_, pixels, rows_.begin, rows,
                                    broadcast_x_ ? x_end_ : gy_end_);
    const int64_t vectors = sum_row_ / kLanes<T>;
    for_equal_parts<kMaxVectors>(vectors, [&](auto of_panel, int64_t vector) {
      constexpr int kVectors = decltype(of_panel)::value;
      const int64_t first = vector * kLanes<T>;
      const RunTerms<Acc> b =
          b_.load(broadcast_x_ ? gy_ : x_, pixels, first,
                  least(kVectors * kLanes<T>, lanes_ - first), broadcast_x_ ? gy_end_ : x_end_);
      for_equal_parts<kTileRows<kVectors>>(rows, [&](auto of_tile, int64_t row) {
        wgrad_tile<kPairs, decltype(of_tile)::value, kVectors>(
            {a.at, a.first + row}, b, terms, runs_ > 0, sums_.data() + row * sum_row_ + first,
            sum_row_);
      });
    });
    if (++runs_ == kRunsJoined) join();
  }

  void join() {
    for (int64_t i = 0; i < (rows_.end - rows_.begin) * sum_row_; i += kLanes<T>) {
      const Vec<Acc> sum = load_vec(sums_.data() + i);
      store_vec(total_ + i, add_ ? load_vec(total_ + i) + sum : sum);
    }
    add_ = true;
    runs_ = 0;
  }

  const WgradWalk& walk_;
  bool broadcast_x_;
  int64_t lanes_, sum_row_;
  RunOperand<kPairs, T> a_, b_;
  Scratch<Acc> sums_;
  Range rows_{};
  Acc* total_ = nullptr;
  bool add_ = false;
  int64_t runs_ = 0;
  const T *x_end_, *gy_end_;
  const T* x_[kPixels];
  const T* gy_[kPixels];
};

// gw, of operands that come `images` at a time: load(n, count) gives those of images [n, n +
// count).
template <bool kPairs, class T, class Load>
void wgrad_loaded(const WgradWalk& walk, int64_t images, const Load& load, T* gw,
                  const Context& context) {
  using Acc = accumulate_t<T>;
  const ConvProblem& p = walk.p;
  // Lanes of x, which is how gw lies, unless gy's fill vectors better.
  const bool broadcast_x = p.c < p.k && p.c % (kMaxVectors * kLanes<T>) != 0;
  const int64_t rows = broadcast_x ? p.c : p.k;
  const int64_t lanes = broadcast_x ? p.k : p.c;
  const int64_t sum_row = round_up(lanes, kLanes<T>);
  const int64_t places = p.window_elements();
  // A task: some rows of pixels, one group, one place, a block of broadcast channels. Several
  // tasks, whatever the number of threads: of chunks where sums are long, else of small blocks.
  constexpr int64_t kTasks = 16, kLeastPixels = 2048, kMostRows = 128, kLeastRows = 48;
  const int64_t high = ceil_div(rows, kMostRows);
  const int64_t chunks = most(1, least(ceil_div(kTasks, p.groups * places * high),
                                       images * p.out_positions() / kLeastPixels));
  const int64_t wanted = ceil_div(kTasks, p.groups * places * chunks);
  const int64_t blocks = most(high, least(wanted, rows / kLeastRows));
  const int64_t block = ceil_div(rows, blocks);
  const int64_t tasks = p.groups * places * blocks;
  const int64_t pixel_rows = p.out[0] * p.out[1];
  const int64_t count = p.groups * places * rows * sum_row;
  Scratch<Acc> partial(chunks * count);
  if (p.n == 0) fill(partial.data(), chunks * count, Acc{0});

  for (int64_t from = 0; from < p.n; from += images) {
    const int64_t loaded = least(images, p.n - from);
    const PixelOperands<T> operands = load(from, loaded);
    const int64_t walked = loaded * pixel_rows;
    parallel_for(context, chunks * tasks, 1, [&](int64_t begin, int64_t end) {
      BlockWgrad<kPairs, T> sums(
          walk, broadcast_x, block, lanes,
          {operands.x + loaded * walk.x_image(), operands.gy + loaded * walk.gy_image()});
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks;
        const Range of_block = {rows * at / blocks, rows * (at + 1) / blocks};
        const int64_t place = task / blocks % places;
        const int64_t group = task / blocks / places % p.groups;
        const int64_t chunk = task / blocks / places / p.groups;
        const int64_t offset[3] = {
            place / p.window[2].size / p.window[1].size * p.window[0].dilation -
                p.window[0].padding,
            place / p.window[2].size % p.window[1].size * p.window[1].dilation -
                p.window[1].padding,
            place % p.window[2].size * p.window[2].dilation - p.window[2].padding};
        sums.run({operands.x + group * p.c, operands.gy + group * p.k}, offset,
                 {walked * chunk / chunks, walked * (chunk + 1) / chunks}, of_block, from > 0,
                 partial.data() + chunk * count +
                     ((group * places + place) * rows + of_block.begin) * sum_row);
      }
    });
  }

  // [group, place, broadcast channel, channel] to [group, K, place, C].
  parallel_for(
      context, p.out_channels(), ceil_div(4096, p.c * places), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at)
          for (int64_t place = 0; place < places; ++place) {
            T* const to = gw + (at * places + place) * p.c;
            const int64_t k = at % p.k;
            const Acc* const from = partial.data() + (at / p.k * places + place) * rows * sum_row +
                                    (broadcast_x ? k : k * sum_row);
            if (broadcast_x) {
              for (int64_t c = 0; c < p.c; ++c) {
                Acc sum = from[c * sum_row];
                for (int64_t chunk = 1; chunk < chunks; ++chunk)
                  sum += from[chunk * count + c * sum_row];
                to[c] = narrow<T>(sum);
              }
              continue;
            }
            for (int64_t c = 0; c < p.c; c += kLanes<T>) {
              Vec<Acc> sum = load_vec(from + c);
              for (int64_t chunk = 1; chunk < chunks; ++chunk)
                sum += load_vec(from + chunk * count + c);
              store_lanes(to + c, sum, p.c - c);
            }
          }
      });
}

// gw [G·K, place, C].
template <class T, class Load>
void wgrad_images(const WgradWalk& walk, int64_t images, const Load& load, T* gw,
                  const Context& context) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (has_pairs()) return wgrad_loaded<true>(walk, images, load, gw, context);
  }
#endif
  wgrad_loaded<false>(walk, images, load, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
