// fprop of few input channels in contiguous float32 on CPU by tiles of 2 x 2 outputs: F(2x2, 3x3)
// (Winograd's, see conv_winograd_transforms.h) for windows of any size and stride.
//
// Along each axis the window's places are cut into runs of up to three that lie a stride apart
// (conv_column_tiles_plan.h). A run of three has products at the points 0, 1, -1 and infinity, of
// two (Karatsuba's) at 0, 1 and infinity, of one at 0 and infinity. The sums of a point are of all
// runs, phases, rows and channels together, and are turned into outputs once: a window of 7x7 takes
// 100 products a channel for four outputs instead of 196.
//
// Tasks are bands of rows of tiles of an image. As in conv_columns.h scratch holds copies of the
// input's rows, one for each product of the column axis, as wide as the tiles and without gaps
// between rows: vectors run along the band's flat tiles. For a few vectors at a time the products
// of the row axis are made of the copies (point by point, in the order in which they are read),
// then the sums of all points for a few output channels. While the next ones are summed, those
// before them become outputs, one vector for each point. Bound: FLOPs, three quarters of the time;
// the rest is the sums' way through the second-level cache and, for windows of 3x3 and maps that
// leave the cache, the outputs.
//
// Numbers: as conv_winograd.h has it; sums of a point are short, so from windows of 5x5 on errors
// are about those of the direct sum, of 7x7 at stride 2 half of them. Coefficients are 0, 1 and
// 1/2: small integers stay exact. What is not finite is seen in the outputs of its tile, also those
// beyond the map; such images are made again the direct way (conv_column_tiles_cpu.cpp).
//
// Lost: tiles of 12 channels x 2 vectors, 16 x 1 and 8 x 3 (3 to 10 %); sums of four points at a
// time, turned along one axis before the next four (10 %); outputs only when all sums of a block of
// channels are there (3 to 8 %); aligned outputs by way of scratch (5 %).
#pragma once

#include "conv/conv_column_tiles_terms.h"

namespace weft::WEFT_TARGET {
namespace {

namespace tile {

// How outputs go to the map. Large ones are asked for ahead of time, larger ones go past the cache:
// straight, or where vectors of rows are not aligned by way of scratch.
enum class Way : uint8_t { plain, ahead, streamed, held };

inline Way way_of(const ConvProblem& p, const float* y) {
  const int64_t size = sizeof(float), bytes = p.out_elements() * size;
  if (!conv_streams(bytes)) return bytes < int64_t{4} << 20 ? Way::plain : Way::ahead;
  const bool aligned =
      reinterpret_cast<uintptr_t>(y) % kVectorBytes == 0 && p.out[2] * size % kVectorBytes == 0;
  return aligned && activates_in_registers(p) ? Way::streamed : Way::held;
}

// Where a band's outputs go: rows of `width` without gaps, channel after channel.
struct Outputs {
  float* out;
  int64_t channel;  // from one to the next
  int64_t width, rows;
  int64_t tiles, tile_rows;  // of a row; rows of them
  Way way;
};

// Sums that wait to be turned into outputs: of some vectors × channels.
struct Waiting {
  int count;  // of both; vectors outermost
  int channels;
  const float* sums;    // [point, vector, channel]
  const float* start;   // of each channel
  float* out;           // of the first channel
  int64_t row, column;  // of the first tile
};

// Lanes [begin, end) of a vector whose lane 0 belongs at `to`; `streams`: all, or none.
WEFT_INLINE void store_between(float* to, V value, int64_t begin, int64_t end, bool streams) {
  begin = most(begin, 0), end = least(end, kLane);
  if (begin >= end) return;
  if (streams) return stream_block<kVectorBytes>(to, &value);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << end) - (1u << begin)), value);
#else
  float lanes[kLane];
  store_vec(lanes, value);
  for (int64_t i = begin; i < end; ++i) to[i] = lanes[i];
#endif
}

// Two vectors of outputs, of row `of_tile` of tiles that lie in more than one row of tiles or end
// beyond the map.
WEFT_INLINE void scatter(const Outputs& o, float* out, int64_t row, int64_t column, int64_t of_tile,
                         const V (&pairs)[2]) {
  for (int64_t done = 0; done < kLane && 2 * row + of_tile < o.rows; ++row, column = 0) {
    const int64_t tiles = least(kLane - done, o.tiles - column);
    float* const to = out + (2 * row + of_tile) * o.width + 2 * (column - done);
    const int64_t end = 2 * done + least(2 * tiles, o.width - 2 * column);
    for (int j = 0; j < 2; ++j)
      store_between(to + j * kLane, pairs[j], 2 * done - j * kLane, end - j * kLane,
                    o.way == Way::streamed);
    done += tiles;
  }
}

// Asks for the memory of a vector of tiles: a channel's is written a few lines at a time, long
// before the next ones, which the processor does not foresee.
WEFT_INLINE void ask_for(const Outputs& o, const float* out, int64_t row, int64_t column) {
  while (column >= o.tiles) column -= o.tiles, ++row;
  const float* const first = out + 2 * row * o.width + 2 * column;
  for (int j = 0; j < 4; ++j) __builtin_prefetch(first + j / 2 * o.width + j % 2 * kLane, 1);
}

// Turns vector `i` of those that wait into outputs; `check` is not finite if a sum is not.
WEFT_INLINE void write_outputs(const Outputs& o, const Waiting& w, bool relu, int i, V& check) {
  const int vector = i / w.channels, channel = i % w.channels;
  int64_t row = w.row, column = w.column + vector * kLane;
  while (column >= o.tiles) column -= o.tiles, ++row;
  const float* const sums = w.sums + i * kLane;
  V halves[kPoints][2];  // turned along the rows
#pragma GCC unroll 4
  for (int at = 0; at < kPoints; ++at)
    outputs_of([&](int point) __attribute__((
                   always_inline)) { return load_vec(sums + (point * kPoints + at) * kPointStep); },
               halves[at][0], halves[at][1]);
  const V start = broadcast<V>(w.start[channel]);
  V all{}, y[2][2];
#pragma GCC unroll 2
  for (int of_tile = 0; of_tile < 2; ++of_tile) {
    V left, right;
    outputs_of([&](int point) __attribute__((always_inline)) { return halves[point][of_tile]; },
               left, right);
    all += left + right;
    left += start, right += start;
    if (relu) left = left <= 0 ? V{} : left, right = right <= 0 ? V{} : right;
    zip(left, right);
    y[of_tile][0] = left, y[of_tile][1] = right;
  }
  float* const out = w.out + channel * o.channel;
  if (2 * (column + kLane) <= o.width && 2 * row + 2 <= o.rows) {
    float* const first = out + 2 * row * o.width + 2 * column;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* const to = first + j / 2 * o.width + j % 2 * kLane;
      if (o.way == Way::streamed)
        stream_block<kVectorBytes>(to, &y[j / 2][j % 2]);
      else
        store_vec(to, y[j / 2][j % 2]);
    }
  } else {
    scatter(o, out, row, column, 0, y[0]);
    scatter(o, out, row, column, 1, y[1]);
    const int64_t tiles = (o.tile_rows - row) * o.tiles - column;
    if (tiles < kLane) {  // what lies beyond the band is none of this image
      float lanes[kLane];
      store_vec(lanes, all);
      all = load_part(lanes, static_cast<int>(tiles));
    }
  }
  check += all * 0;
  if (o.way == Way::ahead) ask_for(o, out, row, column + kVectors * kLane);
}

// sums[point] = Σ source · weights of kCount vectors × kChannels channels at all points, while
// those that wait become outputs.
template <int kChannels, int kCount>
__attribute__((noinline)) void add_terms(const Scheme& s, const float* source, const float* weights,
                                         float* sums, const Outputs& outputs,
                                         const Waiting& waiting, bool relu, V& check) {
  for (int point = 0; point < kPoints * kPoints; ++point, sums += kPointStep) {
    V sum[kChannels][kCount] = {};
    for (int64_t i = 0; i < s.of_point[point]; ++i) {
      V x[kCount];
      for (int v = 0; v < kCount; ++v) x[v] = load_vec(source + v * kLane);
      each_of<kChannels, kCount>([&](int r, int v) { sum[r][v] += weights[r] * x[v]; });
      source += kCount * kLane, weights += kChannels;
    }
    each_of<kChannels, kCount>(
        [&](int r, int v) { store_vec(sums + (v * kChannels + r) * kLane, sum[r][v]); });
    if (point < waiting.count) write_outputs(outputs, waiting, relu, point, check);
  }
}

// What a thread holds of a band.
class Band {
 public:
  Band(const ConvProblem& p, const Scheme& s, Way way)
      : p_(p),
        s_(s),
        way_(way),
        lines_(s.grid),
        copies_(p.c * s.band.channel()),
        source_(s.terms * kVectors * kLane),
        sums_(2 * kPoints * kPoints * kPointStep),
        held_(way == Way::held ? least(p.k, column_tiles::kChannelsAtATime) * held_channel() : 0) {
    fill(copies_.data(), p.c * s.band.channel(), 0.0f);
  }

  // The rows of tiles from `first` on of a group of an image. Returns whether all sums are finite.
  bool run(int64_t first, const float* x, const float* packed, const float* start, float* y) {
    const int64_t rows = least(s_.band.rows, s_.grid.out[1] - first);
    for (int64_t c = 0; c < p_.c; ++c)
      copy_rows(p_, s_, first, x + c * p_.in_positions(), lines_,
                copies_.data() + c * s_.band.channel());
    V check{};
    for (int64_t k = 0; k < p_.k; k += column_tiles::kChannelsAtATime) {
      const int64_t channels = least(p_.k - k, column_tiles::kChannelsAtATime);
      float* const out = y + k * p_.out_positions() + 2 * first * p_.out[2];
      const bool held = way_ == Way::held;
      const Outputs outputs{held ? held_.data() : out,
                            held ? held_channel() : p_.out_positions(),
                            p_.out[2],
                            least(2 * rows, p_.out[1] - 2 * first),
                            s_.band.width,
                            rows,
                            way_};
      add_up(outputs, channels, packed + k * s_.terms, start + k, check);
      for (int64_t i = 0; i < channels; ++i) finish(outputs, i, out + i * p_.out_positions());
    }
    return lanes_that_hold(check != check) == 0;
  }

 private:
  int64_t held_channel() const { return 2 * s_.band.rows * p_.out[2]; }

  // The outputs of the first `channels`.
  void add_up(const Outputs& outputs, int64_t channels, const float* packed, const float* start,
              V& check) {
    const bool relu = p_.activation == Activation::relu;
    const int64_t tiles = outputs.tile_rows * outputs.tiles;
    constexpr int64_t kSums = kPoints * kPoints * kPointStep;
    Waiting waiting{};
    int64_t turn = 0;
    for (int64_t at = 0; at < tiles; at += kVectors * kLane) {
      const int64_t row = at / outputs.tiles, column = at % outputs.tiles;
      with_count<kVectors>(least(kVectors, ceil_div(tiles - at, kLane)), [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        make_terms<kCount>(p_, s_, copies_.data() + at, source_.data());
        for_equal_parts<kRows>(channels, [&](auto of_tile, int64_t k) {
          constexpr int kChannels = decltype(of_tile)::value;
          float* const sums = sums_.data() + turn * kSums;
          add_terms<kChannels, kCount>(s_, source_.data(), packed + k * s_.terms, sums, outputs,
                                       waiting, relu, check);
          waiting = {kChannels * kCount,
                     kChannels,
                     sums,
                     start + k,
                     outputs.out + k * outputs.channel,
                     row,
                     column};
          turn = 1 - turn;
        });
      });
    }
    for (int i = 0; i < waiting.count; ++i) write_outputs(outputs, waiting, relu, i, check);
  }

  // What is left to do for a channel.
  void finish(const Outputs& outputs, int64_t channel, float* y) const {
    float* const held = outputs.out + channel * outputs.channel;
    const int64_t count = outputs.rows * outputs.width;
    if (!activates_in_registers(p_)) activate_row(p_, held, count);
    if (way_ == Way::held) stream_row(y, held, count);
  }

  const ConvProblem& p_;
  const Scheme& s_;
  Way way_;
  PhaseLines<float> lines_;
  Scratch<float> copies_, source_, sums_;
  Scratch<float> held_;  // outputs, before they go past the cache
};

// Rows of tiles of a band: as many as fit, but few enough for several tasks.
inline int64_t band_rows(const ConvProblem& p) {
  int64_t rows = ceil_div(p.out[1], 2);
  while (rows > 1 && (column_tiles::scratch(p, rows) > column_tiles::kElements ||
                      (rows > 4 && p.n * p.groups * ceil_div(ceil_div(p.out[1], 2), rows) < 8)))
    rows = (rows + 1) / 2;
  return rows;
}

}  // namespace tile

// Images whose sums are not all finite are left to the caller, in `failed`.
inline void fprop_column_tiles(const ConvProblem& p, const float* x, const float* w,
                               const float* bias, float* y, uint8_t* failed,
                               const Context& context) {
  const int64_t rows = tile::band_rows(p);
  const tile::Scheme scheme(p, rows);
  const int64_t filter = p.c * p.window_elements();
  Scratch<float> packed(p.groups * p.k * scheme.terms), start(p.groups * p.k);
  for (int64_t k = 0; k < p.groups * p.k; ++k) start[k] = bias != nullptr ? bias[k] : 0.0f;
  const int64_t parts = ceil_div(p.k, column_tiles::kChannelsAtATime);
  parallel_for(context, p.groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * column_tiles::kChannelsAtATime;
      const int64_t at = task / parts * p.k + first;
      for_equal_parts<tile::kRows>(
          least(p.k - first, column_tiles::kChannelsAtATime), [&](auto channels, int64_t k) {
            tile::pack_weights<decltype(channels)::value>(p, scheme, w + (at + k) * filter,
                                                          packed.data() + (at + k) * scheme.terms);
          });
    }
  });
  const int64_t bands = ceil_div(scheme.grid.out[1], rows);
  const tile::Way way = tile::way_of(p, y);
  parallel_for(context, p.n * p.groups * bands, 1, [&](int64_t begin, int64_t end) {
    tile::Band band(p, scheme, way);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / bands, group = image % p.groups;
      if (!band.run(task % bands * rows, x + image * p.c * p.in_positions(),
                    packed.data() + group * p.k * scheme.terms, start.data() + group * p.k,
                    y + image * p.k * p.out_positions()))
        __atomic_store_n(failed + image / p.groups, uint8_t{1}, __ATOMIC_RELAXED);
    }
    if (way == tile::Way::streamed || way == tile::Way::held) stream_fence();
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
