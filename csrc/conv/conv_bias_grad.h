// Bias gradients on CPU: sums of the output's gradient over images and positions, in short chains.
#pragma once

#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

// The sum of a run of at most 64 vectors, in short chains of additions.
template <class T>
WEFT_INLINE Vec<accumulate_t<T>> sum_of_run(const T* from, int64_t count) {
  Vec<accumulate_t<T>> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>)
    for (int v = 0; v < 4; ++v) sum[v] += load_vec(from + i + v * kLanes<T>);
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum[0] += load_vec(from + i);
  if (i < count) sum[1] += load_part(from + i, static_cast<int>(count - i));
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
void bias_grad_planes(const ConvProblem& p, const T* gy, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kRun = 16 * 4 * kLanes<T>;
  const int64_t positions = p.out_positions();
  const int64_t channels = p.out_channels();
  parallel_for(context, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Vec<Acc> total = {};
      for (int64_t n = 0; n < p.n; ++n) {
        const T* const from = gy + (n * channels + k) * positions;
        // Sums of runs, of an image, of all: short chains of additions.
        Vec<Acc> image = {};
        for (int64_t run = 0; run < positions; run += kRun)
          image += sum_of_run(from + run, least(kRun, positions - run));
        total += image;
      }
      gb[k] = narrow<T>(sum_of_lanes<Acc>(total));
    }
  });
}

template <class T>
void bias_grad_pixels(const ConvProblem& p, const T* gy, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  // Sums of a run of pixels, of a block of runs, of all: short chains of additions.
  constexpr int64_t kRun = 32;
  constexpr int64_t kBlock = 32 * kRun;
  const int64_t channels = p.out_channels();
  const int64_t pixels = p.n * p.out_positions();
  parallel_for(context, ceil_div(channels, kLanes<T>), 1, [&](int64_t begin, int64_t end) {
    for (int64_t vector = begin; vector < end; ++vector) {
      const int64_t first = vector * kLanes<T>;
      Vec<Acc> total = {};
      for (int64_t block = 0; block < pixels; block += kBlock) {
        Vec<Acc> runs = {};
        for (int64_t run = block; run < least(block + kBlock, pixels); run += kRun) {
          Vec<Acc> sum = {};
          for (int64_t i = run; i < least(run + kRun, pixels); ++i)
            sum += load_lanes(gy + i * channels + first, channels - first);
          runs += sum;
        }
        total += runs;
      }
      store_lanes(gb + first, total, channels - first);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
