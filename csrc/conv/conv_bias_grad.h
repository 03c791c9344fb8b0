// Bias gradients on CPU: sums of the output's gradient over images and positions, in short chains.
// Where an activation is to be undone, that is done in the same pass, a run at a time, and the
// gradient before it is written. Bound: bytes.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

// The gradient of the sums: gy itself, or `undone` of it and y.
template <class T>
struct GradientOfSums {
  const ConvProblem& p;
  const T* gy;
  const T* y;  // null without an activation
  T* undone;

  const T* run(int64_t first, int64_t count) const {
    if (y == nullptr) return gy + first;
    activation_grad_row(p, gy + first, y + first, undone + first, count);
    return undone + first;
  }
};

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
void bias_grad_planes(const GradientOfSums<T>& grad, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kRun = 16 * 4 * kLanes<T>;
  const int64_t positions = grad.p.out_positions();
  const int64_t channels = grad.p.out_channels();
  parallel_for(context, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Vec<Acc> total = {};
      for (int64_t n = 0; n < grad.p.n; ++n) {
        const int64_t from = (n * channels + k) * positions;
        // Sums of runs, of an image, of all: short chains of additions.
        Vec<Acc> image = {};
        for (int64_t run = 0; run < positions; run += kRun) {
          const int64_t count = least(kRun, positions - run);
          image += sum_of_run(grad.run(from + run, count), count);
        }
        total += image;
      }
      if (gb != nullptr) gb[k] = narrow<T>(sum_of_lanes<Acc>(total));
    }
  });
}

template <class T>
void bias_grad_pixels(const GradientOfSums<T>& grad, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  // Sums of a run of pixels, of a block of runs, of all: short chains of additions.
  constexpr int64_t kRun = 32;
  constexpr int64_t kBlock = 32 * kRun;
  constexpr int kVectors = 8;  // of channels at once, which are neighbours in memory
  const int64_t channels = grad.p.out_channels();
  const int64_t pixels = grad.p.n * grad.p.out_positions();
  const int64_t blocks = ceil_div(pixels, kBlock), row = round_up(channels, kLanes<T>);
  Scratch<Acc> sums(blocks * row);
  parallel_for(context, blocks, 1, [&](int64_t begin, int64_t end) {
    fill(sums.data() + begin * row, (end - begin) * row, Acc{0});
    for (int64_t block = begin; block < end; ++block)
      for (int64_t run = block * kBlock; run < least((block + 1) * kBlock, pixels); run += kRun) {
        const int64_t count = least(kRun, pixels - run);
        const T* const from = grad.run(run * channels, count * channels);
        in_steps<kVectors>(row / kLanes<T>, [&](auto vectors, int64_t vector) {
          constexpr int kCount = decltype(vectors)::value;
          const int64_t first = vector * kLanes<T>;
          Vec<Acc> sum[kCount] = {};
          for (int64_t i = 0; i < count; ++i)
            for (int v = 0; v < kCount; ++v) {
              const int64_t channel = first + v * kLanes<T>;
              sum[v] += load_lanes(from + i * channels + channel, channels - channel);
            }
          for (int v = 0; v < kCount; ++v) {
            Acc* const to = sums.data() + block * row + first + v * kLanes<T>;
            store_vec(to, load_vec(to) + sum[v]);
          }
        });
      }
  });
  if (gb == nullptr) return;
  for (int64_t first = 0; first < channels; first += kLanes<T>) {
    Vec<Acc> total = {};
    for (int64_t block = 0; block < blocks; ++block)
      total += load_vec(sums.data() + block * row + first);
    store_lanes(gb + first, total, channels - first);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
