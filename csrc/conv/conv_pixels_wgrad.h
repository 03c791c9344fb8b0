// Weight gradients of channels-last tensors on CPU: vectors along the channels.
//
// A tile of weights of one place, broadcast channels × vectors of channels, goes through all pixels
// of a few rows; the wider side of the layer is the vectors'. Where the processor has products of
// bf16, an operand's word is the same element of two neighbouring images: any stride and padding
// then pairs the same pixels. Tasks are places × channels × chunks of images, whose sums are added
// in order. Bound: FLOPs. Groups much narrower than a vector waste it.
#pragma once

#include "conv/conv_gather.h"
#include "gemm/pairs_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// A tile: broadcast channels × vectors.
#if defined(__AVX512F__)
inline constexpr int kMaxVectors = 4;
#else
inline constexpr int kMaxVectors = 2;
#endif
inline constexpr int kWgradRows = 6;

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

// Both operands of a weight's sum over some rows of an image: a pixel pair walks along a row by the
// two steps.
template <class Acc>
struct PixelPairs {
  const WgradWalk& walk;
  const Acc* x;  // of the image, first channel of the group
  const Acc* gy;
  int64_t offset[3];  // of the place
  int64_t od;         // a slice of the output
  Range rows;         // and some of its rows

  template <class Body>
  WEFT_INLINE void for_each_row(const Body& body) const {
    const ConvProblem& p = walk.p;
    const Range columns = columns_inside(p.window[2], offset[2], p.in[2], p.out[2]);
    if (columns.begin == columns.end) return;
    const int64_t d = od * p.window[0].stride + offset[0];
    if (d < 0 || d >= p.in[0]) return;
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      const int64_t h = oh * p.window[1].stride + offset[1];
      if (h < 0 || h >= p.in[1]) continue;
      const int64_t w = columns.begin * p.window[2].stride + offset[2];
      body(x + (d * p.in[1] + h) * walk.x_row + w * walk.x_pixel,
           gy + ((od * p.out[1] + oh) * p.out[2] + columns.begin) * p.out_channels(),
           columns.end - columns.begin);
    }
  }
};

// sums[i · sum_row + j] += Σ a[i] · b[j] over the pairs: `rows` broadcast channels i of a,
// `vectors` vectors of channels j of b; a is x and b is gy, or the other way round.
template <bool kPairs, class Acc, int rows, int vectors>
WEFT_INLINE void wgrad_tile(const PixelPairs<Acc>& pairs, bool broadcast_x, int64_t a_first,
                            int64_t b_first, Acc* sums, int64_t sum_row, int64_t lanes) {
  Vec<Acc> sum[rows][vectors] = {};
  const int64_t x_step = pairs.walk.p.window[2].stride * pairs.walk.x_pixel;
  const int64_t gy_step = pairs.walk.p.out_channels();
  const int64_t a_step = broadcast_x ? x_step : gy_step;
  const int64_t b_step = broadcast_x ? gy_step : x_step;
  const bool whole = lanes >= vectors * kLanes<Acc>;
  pairs.for_each_row(
      [&](const Acc* x, const Acc* gy, int64_t count) __attribute__((always_inline)) {
        const Acc* a = (broadcast_x ? x : gy) + a_first;
        const Acc* b = (broadcast_x ? gy : x) + b_first;
        for (; count > 0; --count, a += a_step, b += b_step) {
          Vec<Acc> by[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v)
            by[v] = whole ? load_vec(b + v * kLanes<Acc>)
                          : load_lanes(b + v * kLanes<Acc>, lanes - v * kLanes<Acc>);
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) {
            if constexpr (kPairs) {
              const Vec<Acc> value = broadcast_word(a + i);
#pragma GCC unroll 4
              for (int v = 0; v < vectors; ++v) add_pairs(sum[i][v], value, by[v]);
            } else {
              const Acc value = a[i];
#pragma GCC unroll 4
              for (int v = 0; v < vectors; ++v) sum[i][v] += value * by[v];
            }
          }
        }
      });
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Acc* to = sums + i * sum_row + v * kLanes<Acc>;
      store_vec(to, load_vec(to) + sum[i][v]);
    }
  }
}

// A few images of an operand in the accumulation type, or as words of two images.
template <bool kPairs, class T>
class WgradImages {
 public:
  using Acc = accumulate_t<T>;
  static int64_t count(int64_t images) { return kPairs ? ceil_div(images, 2) : images; }

  WgradImages(const T* data, int64_t image, int64_t images, const Context& context)
      : widened_(data, kPairs ? 0 : image * images, context), data_(widened_.data()) {
#if defined(__AVX512F__)
    if constexpr (kPairs) {
      paired_.resize(count(images) * image);
      data_ = paired_.data();
      constexpr int64_t kBlock = 4096;
      const int64_t blocks = ceil_div(image, kBlock);
      parallel_for(context, count(images) * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t pair = task / blocks;
          const int64_t last = least((task % blocks + 1) * kBlock, image);
          for (int64_t i = task % blocks * kBlock; i < last; i += kLanes<T>) {
            const T* const low = data + 2 * pair * image + i;
            const Words high = 2 * pair + 1 < images ? load_halves(low + image, last - i) : Words{};
            const auto words = as_floats(load_halves(low, last - i) | high << 16);
            store_lanes(paired_.data() + pair * image + i, words, last - i);
          }
        }
      });
    }
#endif
  }
  const Acc* data() const { return data_; }

 private:
  Widened<T> widened_;
  Scratch<Acc> paired_;
  const Acc* data_;
};

template <class T>
struct PixelOperands {
  const T* x;
  const T* gy;
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
  // A task: one chunk of images, one group, one place, a block of broadcast channels.
  const int64_t block = least(rows, 8 * kWgradRows);
  const int64_t blocks = ceil_div(rows, block);
  const int64_t tasks = p.groups * places * blocks;
  using Images = WgradImages<kPairs, T>;
  const int64_t chunks = image_chunks(Images::count(images), tasks);
  const int64_t count = p.groups * places * rows * sum_row;
  // Rows of pixels whose panel of lanes stays in the first-level cache while the tiles of a block
  // go through them, and few enough terms for one sum: sums of bands are added up, which leaves
  // less error than a long sum.
  constexpr int64_t kBandElements = 8 * 1024, kBandTerms = 64;
  const int64_t panel = least(lanes, kMaxVectors * kLanes<T>);
  const int64_t band = most(1, least(kBandElements / (block + panel), kBandTerms) / p.out[2]);
  Scratch<Acc> partial(chunks * count);
  fill(partial.data(), chunks * count, Acc{0});

  for (int64_t from = 0; from < p.n; from += images) {
    const int64_t loaded = least(images, p.n - from);
    const PixelOperands<T> operands = load(from, loaded);
    const Images x(operands.x, walk.x_image(), loaded, context);
    const Images gy(operands.gy, walk.gy_image(), loaded, context);
    const int64_t walked = Images::count(loaded);
    parallel_for(context, chunks * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first_row = task % blocks * block;
        const int64_t block_rows = least(block, rows - first_row);
        const int64_t place = task / blocks % places;
        const int64_t group = task / blocks / places % p.groups;
        const int64_t chunk = task / blocks / places / p.groups;
        const int64_t i = place / p.window[2].size / p.window[1].size;
        const int64_t j = place / p.window[2].size % p.window[1].size;
        const int64_t l = place % p.window[2].size;
        Acc* const sums = partial.data() + chunk * count +
                          ((group * places + place) * rows + first_row) * sum_row;
        for (int64_t n = walked * chunk / chunks; n < walked * (chunk + 1) / chunks; ++n) {
          PixelPairs<Acc> pairs{walk,
                                x.data() + n * walk.x_image() + group * p.c,
                                gy.data() + n * walk.gy_image() + group * p.k,
                                {i * p.window[0].dilation - p.window[0].padding,
                                 j * p.window[1].dilation - p.window[1].padding,
                                 l * p.window[2].dilation - p.window[2].padding},
                                0,
                                {0, 0}};
          for (pairs.od = 0; pairs.od < p.out[0]; ++pairs.od)
            for (int64_t oh = 0; oh < p.out[1]; oh += band) {
              pairs.rows = {oh, least(oh + band, p.out[1])};
              in_steps<kMaxVectors>(sum_row / kLanes<T>, [&](auto vectors, int64_t vector) {
                constexpr int kVectors = decltype(vectors)::value;
                const int64_t first = vector * kLanes<T>;
                in_steps<kWgradRows>(block_rows, [&](auto broadcast, int64_t row) {
                  wgrad_tile<kPairs, Acc, decltype(broadcast)::value, kVectors>(
                      pairs, broadcast_x, first_row + row, first, sums + row * sum_row + first,
                      sum_row, lanes - first);
                });
              });
            }
        }
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
    if (has_pairs() && walk.p.n > 1) return wgrad_loaded<true>(walk, images, load, gw, context);
  }
#endif
  wgrad_loaded<false>(walk, images, load, gw, context);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
