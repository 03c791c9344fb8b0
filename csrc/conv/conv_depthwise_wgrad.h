// Weight gradients of depthwise convolution of channels-last tensors on CPU: vectors along the
// channels, which are the groups.
//
// A task is a run of gradient rows; for a few places of a window row at a time, vectors of sums go
// along the pixels and are then added to the task's. Chains of additions are cut as everywhere.
// Bound: two loads a cycle, about one for each FMA; bytes where windows are small.
#pragma once

#include "conv/conv_depthwise_channels.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kWgradVectors = 4;
#else
inline constexpr int kWgradVectors = 2;
#endif
inline constexpr int kDepthwisePlaces = 4;

// sums[i · sum_row] += Σ x[pixel · x_step + i · place_step] · gy[pixel · channels], places i.
template <class T, int kPlaces, int kVectors, bool kWhole>
void depthwise_wgrad_tile(const T* x, int64_t x_step, int64_t place_step, const T* gy,
                          int64_t channels, int64_t pixels, accumulate_t<T>* sums, int64_t sum_row,
                          int64_t lanes) {
  using Acc = accumulate_t<T>;
  Vec<Acc> sum[kPlaces][kVectors] = {};
  for (; pixels > 0; --pixels, x += x_step, gy += channels)
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Acc> g = load_channels<T, kWhole>(gy + v * kLanes<T>, lanes);
      for (int i = 0; i < kPlaces; ++i)
        sum[i][v] += g * load_channels<T, kWhole>(x + i * place_step + v * kLanes<T>, lanes);
    }
  for (int i = 0; i < kPlaces; ++i)
    for (int v = 0; v < kVectors; ++v) {
      Acc* to = sums + i * sum_row + v * kLanes<T>;
      store_vec(to, load_vec(to) + sum[i][v]);
    }
}

// Sums of rows of the gradient, [place, lane].
template <class T>
class PixelWgrad {
 public:
  using Acc = accumulate_t<T>;

  explicit PixelWgrad(const ConvProblem& p) : p_(p), row_lanes_(round_up(p.groups, kLanes<T>)) {}

  // Adds row `at` of all images.
  void add_row(const T* x, const T* gy, int64_t at, Acc* all_sums) const {
    const Window& w = p_.window[2];
    const int64_t channels = p_.groups;
    const int64_t h = at % p_.out[1];
    const int64_t d = at / p_.out[1] % p_.out[0];
    const T* const image = x + at / p_.out[1] / p_.out[0] * p_.in_positions() * channels;
    const T* const gy_row = gy + at * p_.out[2] * channels;
    for (int64_t t = 0; t < p_.window[0].size; ++t) {
      const int64_t slice = source_of(p_.window[0], d, t, p_.in[0], false);
      if (slice < 0) continue;
      for (int64_t j = 0; j < p_.window[1].size; ++j) {
        const int64_t row = source_of(p_.window[1], h, j, p_.in[1], false);
        if (row < 0) continue;
        const T* const x_row = image + (slice * p_.in[1] + row) * p_.in[2] * channels;
        Acc* const sums = all_sums + (t * p_.window[1].size + j) * w.size * row_lanes_;
        in_steps<kDepthwisePlaces>(w.size, [&](auto place_count, int64_t l) {
          constexpr int kPlaces = decltype(place_count)::value;
          Range all = {0, p_.out[2]};  // columns at which all places are inside
          Range own[kPlaces];
          for (int i = 0; i < kPlaces; ++i) {
            own[i] = columns_inside(w, (l + i) * w.dilation - w.padding, p_.in[2], p_.out[2]);
            all = {most(all.begin, own[i].begin), least(all.end, own[i].end)};
          }
          all.end = most(all.begin, all.end);
          add(place_count, x_row, gy_row, l, all, sums);
          for (int i = 0; i < kPlaces; ++i) {
            const Range before = {own[i].begin, least(own[i].end, all.begin)};
            const Range after = {most(own[i].begin, all.end), own[i].end};
            add(Count<1>{}, x_row, gy_row, l + i, before, sums);
            add(Count<1>{}, x_row, gy_row, l + i, after, sums);
          }
        });
      }
    }
  }

  // sums[channel] += the pixels of row `at` of all images.
  void add_bias_row(const T* gy, int64_t at, Acc* sums) const {
    const T* const row = gy + at * p_.out[2] * p_.groups;
    for_each_vectors<T, kWgradVectors>(p_.groups, [&](auto vectors, auto whole, int64_t first) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t begin = 0; begin < p_.out[2]; begin += kTerms) {
        Vec<Acc> sum[kVectors] = {};
        for (int64_t i = begin; i < least(begin + kTerms, p_.out[2]); ++i)
          for (int v = 0; v < kVectors; ++v)
            sum[v] += load_channels<T, decltype(whole)::value == 1>(
                row + i * p_.groups + first + v * kLanes<T>, p_.groups - first);
        for (int v = 0; v < kVectors; ++v) {
          Acc* const to = sums + first + v * kLanes<T>;
          store_vec(to, load_vec(to) + sum[v]);
        }
      }
    });
  }

 private:
  // Adds places [l, l + kPlaces) of a window row, over output columns `columns`.
  template <class Places>
  void add(Places, const T* x_row, const T* gy_row, int64_t l, Range columns, Acc* sums) const {
    if (columns.begin >= columns.end) return;
    const Window& w = p_.window[2];
    const int64_t channels = p_.groups;
    const int64_t column = w.first_input(columns.begin) + l * w.dilation;
    for_each_vectors<T, kWgradVectors>(channels, [&](auto vectors, auto whole, int64_t first) {
      depthwise_wgrad_tile<T, Places::value, decltype(vectors)::value, decltype(whole)::value == 1>(
          x_row + column * channels + first, w.stride * channels, w.dilation * channels,
          gy_row + columns.begin * channels + first, channels, columns.end - columns.begin,
          sums + l * row_lanes_ + first, row_lanes_, channels - first);
    });
  }

  const ConvProblem& p_;
  int64_t row_lanes_;
};

// gw, and gb unless it is null, from sums [chunk, place, lane], of which a last place is gb's.
template <class T>
void add_pixel_sums(const ConvProblem& p, const accumulate_t<T>* partial, int64_t chunks, T* gw,
                    T* gb, const Context& context) {
  const int64_t places = p.window_elements(), row_lanes = round_up(p.groups, kLanes<T>);
  parallel_for(context, p.groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t place = 0; place < places + (gb != nullptr ? 1 : 0); ++place) {
        accumulate_t<T> sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          sum += partial[(chunk * (places + 1) + place) * row_lanes + c];
        (place < places ? gw[c * places + place] : gb[c]) = narrow<T>(sum);
      }
  });
}

template <class T>
void depthwise_wgrad(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t sums = (p.window_elements() + 1) * round_up(p.groups, kLanes<T>);
  const int64_t rows = p.n * p.out[0] * p.out[1];
  const int64_t chunks = image_chunks(rows, 1);
  Scratch<Acc> partial(chunks * sums);
  parallel_for(context, chunks, 1, [&](int64_t begin, int64_t end) {
    const PixelWgrad<T> wgrad(p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      Acc* const to = partial.data() + chunk * sums;
      fill(to, sums, Acc{0});
      for (int64_t at = rows * chunk / chunks; at < rows * (chunk + 1) / chunks; ++at)
        wgrad.add_row(x, gy, at, to);
    }
  });
  add_pixel_sums<T>(p, partial.data(), chunks, gw, nullptr, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
