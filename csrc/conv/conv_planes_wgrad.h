// Weight gradients of contiguous tensors of few channels on CPU: vectors along flattened planes.
//
// Source and gradient lie in scratch as flat runs of one pitch (conv_bands.h). Places × channels
// are summed over the run, each as a vector that is folded at the end. Bound: FLOPs.
#pragma once

#include "conv/conv_bands.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kWgradPlaces = 4;
#else
inline constexpr int kWgradPlaces = 2;
#endif
inline constexpr int kWgradChannels = 4;
inline constexpr int kWgradSinglePlaces = 8;  // of one channel

// Runs of a few images in scratch: planes of some input channels, flat gradients of all channels,
// which are zero between their rows.
template <class Acc>
struct WgradRuns {
  int64_t images;
  int64_t positions;  // of a run, a whole number of vectors
  const Acc* x;
  int64_t x_image;
  const Acc* gy;  // [image, channel, position]
  int64_t channels;
};

// Adds to sums[taps[i].weight + k · sum_step] the product of the runs, for kPlaces taps i and
// kChannels channels k. `inside`, if there, keeps out what lies between the rows: the gradient is
// zero there, but the input may be infinite. Without it, a sum that is not finite adds nothing and
// returns false.
template <class Acc, int kPlaces, int kChannels>
bool wgrad_tile(const WgradRuns<Acc>& runs, const Tap* taps, int64_t channel,
                const typename LaneMask<Acc>::type* inside, Acc* sums, int64_t sum_step) {
  using V = Vec<Acc>;
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  V sum[kPlaces][kChannels] = {};
  for (int64_t n = 0; n < runs.images; ++n) {
    const Acc* x = runs.x + n * runs.x_image;
    const Acc* gy = runs.gy + (n * runs.channels + channel) * runs.positions;
    for (int64_t at = 0; at < runs.positions; at += kCount) {
      V g[kChannels];
      for (int k = 0; k < kChannels; ++k) g[k] = load_vec(gy + k * runs.positions + at);
      for (int i = 0; i < kPlaces; ++i) {
        V value = load_vec(x + taps[i].source + at);
        if (inside != nullptr) {
          Vec<typename LaneMask<Acc>::type> keep;
          memcpy(&keep, inside + at, sizeof(keep));
          value = keep ? value : V{};
        }
        for (int k = 0; k < kChannels; ++k) sum[i][k] += value * g[k];
      }
    }
  }
  Acc total[kPlaces][kChannels];
  bool finite = true;
  for (int i = 0; i < kPlaces; ++i)
    for (int k = 0; k < kChannels; ++k) {
      total[i][k] = sum_of_lanes<Acc>(sum[i][k]);
      finite = finite && total[i][k] - total[i][k] == 0;
    }
  if (inside == nullptr && !finite) return false;
  for (int i = 0; i < kPlaces; ++i)
    for (int k = 0; k < kChannels; ++k) sums[taps[i].weight + k * sum_step] += total[i][k];
  return true;
}

template <class T>
void wgrad_planes(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  using Mask = typename LaneMask<Acc>::type;
  const Gather g = fprop_gather(p);
  const int64_t places = p.window_elements();
  // Enough input channels at a time that copying the gradient's rows is little work.
  const int64_t block = least(p.c, most(1, ceil_div(32, places)));
  const int64_t blocks = ceil_div(p.c, block);
  const auto run_elements = [&](const Planes& planes, int64_t rows) {
    return block * planes.channel() + p.k * round_up(rows * planes.pitch, kLanes<T>);
  };
  int64_t band = p.out[1];
  const auto elements = [&] {
    return run_elements(band_planes(p, g, p.out[0] / 2, 0, band), band);
  };
  while (band > 1 && elements() > kScratchElements) band = (band + 1) / 2;
  const int64_t images =
      band < p.out[1] ? 1 : most(1, least(p.n, kScratchElements / most(elements(), 1)));
  const int64_t chunks = image_chunks(ceil_div(p.n, images), p.groups * blocks);
  const int64_t chunk_images = round_up(ceil_div(p.n, chunks), images);

  const int64_t count = p.weight_elements();
  Scratch<Acc> partial(chunks * count);
  parallel_for(context, chunks * p.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> x_scratch, gy_scratch;
    Scratch<Mask> mask;
    Scratch<Tap> taps(block * places);
    Scratch<Range> row_taps(p.out[1]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_c = task % blocks * block;
      const int64_t channels = least(block, p.c - first_c);
      const int64_t group = task / blocks % p.groups;
      const int64_t chunk = task / blocks / p.groups;
      // Weight (k, c, place) of this task is at sums[(k · C + c − first_c) · places + place].
      Acc* sums = partial.data() + chunk * count + (group * p.k * p.c + first_c) * places;
      for (int64_t k = 0; k < p.k; ++k) fill(sums + k * p.c * places, channels * places, Acc{0});
      const int64_t last = least(p.n, (chunk + 1) * chunk_images);
      for (int64_t d = 0; d < p.out[0]; ++d)
        for (int64_t first_row = 0; first_row < p.out[1]; first_row += band) {
          const int64_t rows = least(band, p.out[1] - first_row);
          const Planes planes = band_planes(p, g, d, first_row, first_row + rows);
          PhaseTaps phase{};
          phase.rows = axis_phase(p.window[1], first_row, first_row + rows, 0, false);
          phase.columns = axis_phase(p.window[2], 0, p.out[2], 0, false);
          phase.taps = taps.data();
          phase.of_row = row_taps.data();
          const int64_t window_taps = list_taps(p, g, planes, d, phase);
          for (int64_t c = 1; c < channels; ++c)
            for (int64_t i = 0; i < window_taps; ++i)
              taps[c * window_taps + i] = {taps[i].source + c * planes.channel(),
                                           taps[i].weight + c * places};
          WgradRuns<Acc> runs{};
          runs.positions = round_up((rows - 1) * planes.pitch + p.out[2], kLanes<T>);
          runs.x_image = channels * planes.channel();
          runs.channels = p.k;
          const int64_t slack = planes.pitch + kLanes<T>;
          // Padding and what lies between rows stay zero from one fill to the next.
          x_scratch.resize(images * runs.x_image + slack);
          fill(x_scratch.data(), images * runs.x_image + slack, Acc{0});
          gy_scratch.resize(images * p.k * runs.positions);
          fill(gy_scratch.data(), images * p.k * runs.positions, Acc{0});
          mask.resize(runs.positions);
          fill(mask.data(), runs.positions, Mask{0});
          for (int64_t row = 0; row < rows; ++row)
            fill(mask.data() + row * planes.pitch, p.out[2], Mask{-1});
          runs.x = x_scratch.data();
          runs.gy = gy_scratch.data();
          for (int64_t n = chunk * chunk_images; n < last; n += images) {
            runs.images = least(images, last - n);
            for (int64_t i = 0; i < runs.images; ++i) {
              const int64_t image = (n + i) * p.groups + group;
              for (int64_t c = 0; c < channels; ++c)
                fill_planes(p, g, planes, x + (image * p.c + first_c + c) * p.in_positions(),
                            x_scratch.data() + i * runs.x_image + c * planes.channel());
              for (int64_t k = 0; k < p.k; ++k)
                for (int64_t row = 0; row < rows; ++row)
                  copy_row(gy_scratch.data() + (i * p.k + k) * runs.positions + row * planes.pitch,
                           gy + (image * p.k + k) * p.out_positions() +
                               (d * p.out[1] + first_row + row) * p.out[2],
                           p.out[2]);
            }
            const auto tile = [&](auto tap_count, auto channel_count, int64_t tap, int64_t k) {
              constexpr int kPlaces = decltype(tap_count)::value;
              constexpr int kChannels = decltype(channel_count)::value;
              const Mask* const masks[] = {nullptr, mask.data()};
              for (const Mask* inside : masks)
                if (wgrad_tile<Acc, kPlaces, kChannels>(runs, taps.data() + tap, k, inside,
                                                        sums + k * p.c * places, p.c * places))
                  break;
            };
            const int64_t all = channels * window_taps;
            if (p.k == 1)
              in_steps<kWgradSinglePlaces>(
                  all, [&](auto tap_count, int64_t tap) { tile(tap_count, Count<1>{}, tap, 0); });
            else
              in_steps<kWgradPlaces>(all, [&](auto tap_count, int64_t tap) {
                in_steps<kWgradChannels>(p.k, [&](auto channel_count, int64_t k) {
                  tile(tap_count, channel_count, tap, k);
                });
              });
          }
        }
    }
  });
  parallel_for(context, count, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Acc sum = partial[i];
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += partial[chunk * count + i];
      gw[i] = narrow<T>(sum);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
