// Convolution of channels-last tensors on CPU: vectors along the channels.
//
// fprop and dgrad: weights are packed once, so that a tile reads its own from end to end. A tile of
// a few pixels of a row × a few vectors of destination channels stays in registers; each place
// gives a pointer per pixel (to a row of zeros in the padding), and the loop over source channels
// loads the weights' vectors and broadcasts the pixels' values. A strided dgrad takes its pixels
// phase by phase, so that all of a tile meet the same places. wgrad: a tile of weights of one
// place, broadcast channels × vectors of channels, goes through all pixels of an image; the wider
// side of the layer is the vectors'. Chains of additions are cut about every `kTerms`. Bound:
// FLOPs. Groups much narrower than a vector waste it.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"

namespace weft::WEFT_TARGET {
namespace {

// A tile: pixels × vectors (fprop, dgrad); broadcast channels × vectors (wgrad).
#if defined(__AVX512F__)
inline constexpr int kMaxVectors = 4;
#else
inline constexpr int kMaxVectors = 2;
#endif
inline constexpr int kPixels = 6;
inline constexpr int kWgradRows = 4;

template <class T>
WEFT_INLINE Vec<accumulate_t<T>> load_lanes(const T* address, int64_t count) {
  return count >= kLanes<T> ? load_vec(address) : load_part(address, static_cast<int>(count));
}
template <class T>
WEFT_INLINE void store_lanes(T* address, Vec<accumulate_t<T>> value, int64_t count) {
  if (count >= kLanes<T>)
    store_vec(address, value);
  else
    store_part(address, value, static_cast<int>(count));
}

// ---- fprop and dgrad ---------------------------------------------------------------------------

// What a row of destination pixels needs: filled per task.
template <class Acc>
struct PixelRow {
  const ConvProblem& p;
  const Gather& g;
  const Acc* source;  // row `first_row` of slice `first_slice`, first channel of the group
  const Acc* zeros;   // a pixel of the padding
  int64_t first_slice, first_row, slice_step;
  int64_t d, h;      // of the destination
  int64_t channels;  // of the source, from pixel to pixel
  int64_t phases;    // pixels of a tile are this far apart

  // Calls body(place, sources[pixels]) for each place at which one of the pixels w, w + phases, ...
  // reads the source.
  template <int pixels, class Body>
  WEFT_INLINE void for_each_place(int64_t w, const Body& body) const {
    for (int64_t i = 0; i < p.window[0].size; ++i) {
      const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
      if (slice < 0) continue;
      for (int64_t j = 0; j < p.window[1].size; ++j) {
        const int64_t row = source_of(p.window[1], h, j, g.src[1], g.transposed);
        if (row < 0) continue;
        const Acc* from =
            source + (slice - first_slice) * slice_step + (row - first_row) * g.src[2] * channels;
        for (int64_t l = 0; l < p.window[2].size; ++l) {
          const Acc* pixel[pixels];
          bool read = false;
          for (int q = 0; q < pixels; ++q) {
            const int64_t column =
                source_of(p.window[2], w + q * phases, l, g.src[2], g.transposed);
            pixel[q] = column < 0 ? zeros : from + column * channels;
            read = read || column >= 0;
          }
          if (read) body((i * p.window[1].size + j) * p.window[2].size + l, pixel);
        }
      }
    }
  }
};

// dst[q · dst_step + j] for `pixels` pixels q and `vectors` vectors of destination channels j.
template <class T, int pixels, int vectors>
void pixel_tile(const PixelRow<accumulate_t<T>>& row, int64_t w, const accumulate_t<T>* weights,
                const accumulate_t<T>* bias, T* dst, int64_t dst_step, int64_t lanes) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kRow = vectors * kLanes<T>;
  // Sums of about kTerms products, and their total.
  Vec<Acc> sum[pixels][vectors] = {}, total[pixels][vectors];
  for (int q = 0; q < pixels; ++q)
    for (int v = 0; v < vectors; ++v) total[q][v] = load_vec(bias + v * kLanes<T>);
  const int64_t channels = row.g.src_channels;
  int64_t terms = 0;
  const auto add_sums = [&]() __attribute__((always_inline)) {
    terms = 0;
    for (int q = 0; q < pixels; ++q)
      for (int v = 0; v < vectors; ++v) {
        total[q][v] += sum[q][v];
        sum[q][v] = Vec<Acc>{};
      }
  };
  row.template for_each_place<pixels>(
      w, [&](int64_t place, const Acc* const* source) __attribute__((always_inline)) {
        const Acc* weight = weights + place * channels * kRow;
        for (int64_t c = 0; c < channels;) {
          const int64_t end = least(channels, c + kTerms);
          terms += end - c;
          for (; c < end; ++c, weight += kRow) {
            Vec<Acc> by[vectors];
            for (int v = 0; v < vectors; ++v) by[v] = load_vec(weight + v * kLanes<T>);
            for (int q = 0; q < pixels; ++q) {
              const Acc x = source[q][c];
              for (int v = 0; v < vectors; ++v) sum[q][v] += x * by[v];
            }
          }
          if (terms >= kTerms) add_sums();
        }
      });
  add_sums();
  for (int q = 0; q < pixels; ++q)
    for (int v = 0; v < vectors; ++v)
      store_lanes(dst + q * dst_step + v * kLanes<T>, total[q][v], lanes - v * kLanes<T>);
}

// Weights [G·K, place, C] as [group, panel, place, source channel, destination channel of the
// panel]: a panel is what one tile reads. The last one's channels are padded to whole vectors.
template <class T>
void pack_weights(const ConvProblem& p, const Gather& g, const T* weights, int64_t row,
                  accumulate_t<T>* out, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements();
  const int64_t src_step = g.transposed ? places * p.c : 1;
  const int64_t dst_step = g.transposed ? 1 : places * p.c;
  constexpr int64_t kPanel = kMaxVectors * kLanes<T>;
  const int64_t panels = ceil_div(row, kPanel);
  parallel_for(context, p.groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % panels * kPanel;
      const int64_t lanes = least(kPanel, row - first);
      const int64_t channels = least(lanes, g.dst_channels - first);
      const T* from = weights + i / panels * p.k * places * p.c + first * dst_step;
      Acc* to = out + (i / panels * row + first) * places * g.src_channels;
      for (int64_t place = 0; place < places; ++place, from += p.c)
        for (int64_t c = 0; c < g.src_channels; ++c, to += lanes) {
          for (int64_t k = 0; k < channels; ++k) to[k] = widen(from[c * src_step + k * dst_step]);
          fill(to + channels, lanes - channels, Acc{0});
        }
    }
  });
}

template <class T>
void gather_pixels(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                   const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t dst_lanes = g.dst_channels;
  const int64_t row_lanes = round_up(dst_lanes, kLanes<T>);
  const int64_t group_weights = p.window_elements() * g.src_channels * row_lanes;
  Scratch<Acc> packed(p.groups * group_weights);
  pack_weights(p, g, weights, row_lanes, packed.data(), context);
  Scratch<Acc> wide_bias(p.groups * row_lanes);
  fill(wide_bias.data(), p.groups * row_lanes, Acc{0});
  if (bias != nullptr)
    for (int64_t i = 0; i < p.groups; ++i)
      for (int64_t k = 0; k < dst_lanes; ++k)
        wide_bias[i * row_lanes + k] = widen(bias[i * dst_lanes + k]);
  const int64_t src_pixel = p.groups * g.src_channels;
  const int64_t dst_pixel = p.groups * g.dst_channels;
  Scratch<Acc> zeros(src_pixel);
  fill(zeros.data(), src_pixel, Acc{0});
  const int64_t phases = g.transposed ? p.window[2].stride : 1;

  // Half elements are widened row by row, before many tiles broadcast them.
  const auto most_sources = [&](int axis) {
    const Window& w = p.window[axis];
    return least(g.transposed ? (w.span() - 1) / w.stride + 1 : w.span(), g.src[axis]);
  };
  const int64_t src_row = g.src[2] * src_pixel;
  const int64_t wide_slice = most_sources(1) * src_row;

  parallel_for(context, p.n * g.dst[0] * g.dst[1], 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> wide(Widened<T>::kCopies ? most_sources(0) * wide_slice : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t h = task % g.dst[1];
      const int64_t d = task / g.dst[1] % g.dst[0];
      const int64_t n = task / g.dst[1] / g.dst[0];
      const T* const image = src + n * g.src_positions() * src_pixel;
      PixelRow<Acc> row{p, g, nullptr,   zeros.data(), 0, 0, g.src[1] * src_row,
                        d, h, src_pixel, phases};
      const Acc* source;
      if constexpr (Widened<T>::kCopies) {
        const Range slices = sources_of(p.window[0], d, d + 1, g.src[0], g.transposed);
        const Range rows = sources_of(p.window[1], h, h + 1, g.src[1], g.transposed);
        for (int64_t slice = slices.begin; slice < slices.end; ++slice)
          copy_row(wide.data() + (slice - slices.begin) * wide_slice,
                   image + (slice * g.src[1] + rows.begin) * src_row,
                   (rows.end - rows.begin) * src_row);
        row.first_slice = slices.begin;
        row.first_row = rows.begin;
        row.slice_step = wide_slice;
        source = wide.data();
      } else {
        source = image;
      }
      for (int64_t walk = 0; walk < p.groups; ++walk) {
        row.source = source + walk * g.src_channels;
        T* const out = dst + task * g.dst[2] * dst_pixel + walk * g.dst_channels;
        const Acc* const walk_weights = packed.data() + walk * group_weights;
        const Acc* const walk_bias = wide_bias.data() + walk * row_lanes;
        in_steps<kMaxVectors>(row_lanes / kLanes<T>, [&](auto vectors, int64_t vector) {
          const int64_t first = vector * kLanes<T>;
          const Acc* const panel = walk_weights + first * p.window_elements() * g.src_channels;
          for (int64_t phase = 0; phase < least(phases, g.dst[2]); ++phase) {
            const int64_t pixels = ceil_div(g.dst[2] - phase, phases);
            const auto tile = [&](auto count, int64_t pixel) {
              constexpr int kCount = decltype(count)::value;
              constexpr int kVectors = decltype(vectors)::value;
              const int64_t w = phase + pixel * phases;
              T* to = out + w * dst_pixel + first;
              pixel_tile<T, kCount, kVectors>(row, w, panel, walk_bias + first, to,
                                              phases * dst_pixel, dst_lanes - first);
            };
            in_even_steps<kPixels>(pixels, tile);
          }
        });
      }
      activate_row(p, dst + task * g.dst[2] * dst_pixel, g.dst[2] * dst_pixel);
    }
  });
}

// ---- wgrad -------------------------------------------------------------------------------------

// Both operands of a weight's sum over some rows of an image: a pixel pair walks along a row by the
// two steps.
template <class Acc>
struct PixelPairs {
  const ConvProblem& p;
  const Acc* x;  // of the image, first channel of the group
  const Acc* gy;
  int64_t offset[3];  // of the place
  int64_t od;         // a slice of the output
  Range rows;         // and some of its rows

  template <class Body>
  WEFT_INLINE void for_each_row(const Body& body) const {
    const Range columns = columns_inside(p.window[2], offset[2], p.in[2], p.out[2]);
    if (columns.begin == columns.end) return;
    const int64_t d = od * p.window[0].stride + offset[0];
    if (d < 0 || d >= p.in[0]) return;
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      const int64_t h = oh * p.window[1].stride + offset[1];
      if (h < 0 || h >= p.in[1]) continue;
      const int64_t w = columns.begin * p.window[2].stride + offset[2];
      body(x + ((d * p.in[1] + h) * p.in[2] + w) * p.in_channels(),
           gy + ((od * p.out[1] + oh) * p.out[2] + columns.begin) * p.out_channels(),
           columns.end - columns.begin);
    }
  }
};

// sums[i · sum_row + j] += Σ a[i] · b[j] over the pairs: `rows` broadcast channels i of a,
// `vectors` vectors of channels j of b; a is x and b is gy, or the other way round.
template <class Acc, int rows, int vectors>
WEFT_INLINE void wgrad_tile(const PixelPairs<Acc>& pairs, bool broadcast_x, int64_t a_first,
                            int64_t b_first, Acc* sums, int64_t sum_row, int64_t lanes) {
  Vec<Acc> sum[rows][vectors] = {};
  const int64_t x_step = pairs.p.window[2].stride * pairs.p.in_channels();
  const int64_t gy_step = pairs.p.out_channels();
  const int64_t a_step = broadcast_x ? x_step : gy_step;
  const int64_t b_step = broadcast_x ? gy_step : x_step;
  const bool whole = lanes >= vectors * kLanes<Acc>;
  pairs.for_each_row(
      [&](const Acc* x, const Acc* gy, int64_t count) __attribute__((always_inline)) {
        const Acc* a = (broadcast_x ? x : gy) + a_first;
        const Acc* b = (broadcast_x ? gy : x) + b_first;
        for (; count > 0; --count, a += a_step, b += b_step) {
          Vec<Acc> by[vectors];
          for (int v = 0; v < vectors; ++v)
            by[v] = whole ? load_vec(b + v * kLanes<Acc>)
                          : load_lanes(b + v * kLanes<Acc>, lanes - v * kLanes<Acc>);
          for (int i = 0; i < rows; ++i) {
            const Acc value = a[i];
            for (int v = 0; v < vectors; ++v) sum[i][v] += value * by[v];
          }
        }
      });
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) {
      Acc* to = sums + i * sum_row + v * kLanes<Acc>;
      store_vec(to, load_vec(to) + sum[i][v]);
    }
}

// Images go a few at a time: they stay in the cache while all places go through them, and copies of
// them are small.
inline int64_t images_at_a_time(int64_t images, int64_t elements) {
  constexpr int64_t kElements = 1 << 20;
  return most(1, least(images, kElements / most(elements, 1)));
}

template <class T>
struct PixelOperands {
  const T* x;
  const T* gy;
};

// gw, of operands that come `images` at a time: load(n, count) gives those of images [n, n +
// count).
template <class T, class Load>
void wgrad_images(const ConvProblem& p, int64_t images, const Load& load, T* gw,
                  const Context& context) {
  using Acc = accumulate_t<T>;
  const bool broadcast_x = p.c <= p.k;
  const int64_t walks = p.groups;
  const int64_t rows = broadcast_x ? p.c : p.k;
  const int64_t lanes = broadcast_x ? p.k : p.c;
  const int64_t sum_row = round_up(lanes, kLanes<T>);
  const int64_t places = p.window_elements();
  // A task: one chunk of images, one group, one place, a block of broadcast channels.
  const int64_t block = least(rows, 8 * kWgradRows);
  const int64_t blocks = ceil_div(rows, block);
  const int64_t tasks = walks * places * blocks;
  const int64_t chunks = image_chunks(images, tasks);
  const int64_t count = walks * places * rows * sum_row;
  // Rows of pixels that stay in the cache while the tiles of a block go through them, and few
  // enough terms for one sum: sums of bands are added up, which leaves less error than a long sum.
  constexpr int64_t kBandElements = 6 * 1024, kBandTerms = 64;
  const int64_t band = most(1, least(kBandElements / (block + lanes), kBandTerms) / p.out[2]);
  Scratch<Acc> partial(chunks * count);
  fill(partial.data(), chunks * count, Acc{0});

  for (int64_t from = 0; from < p.n; from += images) {
    const int64_t loaded = least(images, p.n - from);
    const PixelOperands<T> operands = load(from, loaded);
    const Widened<T> wide_x(operands.x, p.in_elements() / p.n * loaded, context);
    const Widened<T> wide_gy(operands.gy, p.out_elements() / p.n * loaded, context);
    parallel_for(context, chunks * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first_row = task % blocks * block;
        const int64_t block_rows = least(block, rows - first_row);
        const int64_t place = task / blocks % places;
        const int64_t walk = task / blocks / places % walks;
        const int64_t chunk = task / blocks / places / walks;
        const int64_t i = place / p.window[2].size / p.window[1].size;
        const int64_t j = place / p.window[2].size % p.window[1].size;
        const int64_t l = place % p.window[2].size;
        Acc* const sums =
            partial.data() + chunk * count + ((walk * places + place) * rows + first_row) * sum_row;
        for (int64_t n = loaded * chunk / chunks; n < loaded * (chunk + 1) / chunks; ++n) {
          PixelPairs<Acc> pairs{
              p,
              wide_x.data() + n * p.in_positions() * p.in_channels() + walk * p.c,
              wide_gy.data() + n * p.out_positions() * p.out_channels() + walk * p.k,
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
                  wgrad_tile<Acc, decltype(broadcast)::value, kVectors>(
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
  parallel_for(context, p.out_channels(), ceil_div(4096, p.c * places),
               [&](int64_t begin, int64_t end) {
                 for (int64_t at = begin; at < end; ++at)
                   for (int64_t place = 0; place < places; ++place)
                     for (int64_t c = 0; c < p.c; ++c) {
                       const int64_t k = at % p.k;
                       const int64_t walk = at / p.k;
                       const int64_t row = broadcast_x ? c : k;
                       const int64_t lane = broadcast_x ? k : c;
                       const Acc* from =
                           partial.data() + ((walk * places + place) * rows + row) * sum_row + lane;
                       Acc sum = *from;
                       for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += from[chunk * count];
                       gw[(at * places + place) * p.c + c] = narrow<T>(sum);
                     }
               });
}

template <class T>
void wgrad_pixels(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  const int64_t x_image = p.in_channels() * p.in_positions();
  const int64_t gy_image = p.out_channels() * p.out_positions();
  const auto load = [&](int64_t n, int64_t) {
    return PixelOperands<T>{x + n * x_image, gy + n * gy_image};
  };
  wgrad_images<T>(p, images_at_a_time(p.n, x_image + gy_image), load, gw, context);
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
