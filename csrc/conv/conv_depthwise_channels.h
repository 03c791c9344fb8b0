// Depthwise convolution of channels-last tensors on CPU: the tile, a few pixels × a few vectors of
// channels, which stays in registers.
//
// Neighbouring places of a window row are one tap: a source column, loaded once, serves every pixel
// of the tile that one of the places maps to it, so that P pixels and M places need P + M − 1 loads
// for P · M products. Columns outside the source are passed over.
#pragma once

#include "conv/conv_gather.h"
#include "conv/conv_registers.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kTileVectors = 2;
#else
inline constexpr int kTileVectors = 1;
#endif
inline constexpr int kTilePixels = 8;
inline constexpr int kTapPlaces = 4;  // whose weights are held in registers

// Calls body(Count<vectors>, Count<whole>, first channel) over all channels; only a last single
// vector may not be whole.
template <class T, int kVectors, class Body>
WEFT_INLINE void for_each_vectors(int64_t channels, const Body& body) {
  const int64_t whole = channels / kLanes<T>;
  in_steps<kVectors>(
      whole, [&](auto vectors, int64_t vector) { body(vectors, Count<1>{}, vector * kLanes<T>); });
  if (whole * kLanes<T> < channels) body(Count<1>{}, Count<0>{}, whole * kLanes<T>);
}

template <class T, bool kWhole>
WEFT_INLINE Vec<accumulate_t<T>> load_channels(const T* address, int64_t lanes) {
  return kWhole ? load_vec(address) : load_part(address, static_cast<int>(lanes));
}

// Place j of a tap reads, for pixel q, the source (q + j) pixel steps past the first one's.
struct ChannelTap {
  int64_t source;  // of place 0 and pixel 0
  int64_t column;  // the same, of its row
  int64_t weight;  // of place 0
  int64_t step;    // from place to place among the weights
};

// Taps of equally many places.
struct ChannelRun {
  const ChannelTap* taps;
  int64_t count;
  int64_t places;
};

template <class T>
struct ChannelTile {
  const T* source;
  int64_t source_step;  // from pixel to pixel
  int64_t column;       // what a tap's is counted from
  int64_t column_step;
  int64_t columns;  // of a source row
  const accumulate_t<T>* weights;
  const accumulate_t<T>* bias;
  T* dst;
  int64_t dst_step;
  int64_t lanes;
};

// A tile's sums between two runs of taps.
template <class Acc, int kPixels, int kVectors>
struct PixelSums {
  Vec<Acc> at[kPixels][kVectors];
};

template <class T, int kPlaces, int kPixels, int kVectors, bool kWhole>
__attribute__((noinline)) void add_channel_taps(
    const ChannelRun& run, const ChannelTile<T>& t, bool first, bool last,
    PixelSums<accumulate_t<T>, kPixels, kVectors>& kept) {
  using Acc = accumulate_t<T>;
  Vec<Acc> sum[kPixels][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kPixels; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[q][v] = first ? load_vec(t.bias + v * kLanes<T>) : Vec<Acc>{};
  for (const ChannelTap* tap = run.taps; tap != run.taps + run.count; ++tap) {
    const T* from = t.source + tap->source;
    int64_t column = t.column + tap->column;
    Vec<Acc> weight[kPlaces][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kPlaces; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        weight[j][v] = load_vec(t.weights + tap->weight + j * tap->step + v * kLanes<T>);
#pragma GCC unroll 16
    for (int s = 0; s < kPixels + kPlaces - 1; ++s) {
      if (static_cast<uint64_t>(column) < static_cast<uint64_t>(t.columns)) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vec<Acc> x = in_register(load_channels<T, kWhole>(from + v * kLanes<T>, t.lanes));
#pragma GCC unroll 8
          for (int j = 0; j < kPlaces; ++j)
            if (s - j >= 0 && s - j < kPixels) sum[s - j][v] += weight[j][v] * x;
        }
      }
      from = computed(from + t.source_step);
      column += t.column_step;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kPixels; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (!first) sum[q][v] += kept.at[q][v];
      T* const to = t.dst + q * t.dst_step + v * kLanes<T>;
      if (!last)
        kept.at[q][v] = sum[q][v];
      else if (kWhole)
        store_vec(to, sum[q][v]);
      else
        store_part(to, sum[q][v], static_cast<int>(t.lanes));
    }
}

// All runs of a tile, of which there is at least one.
template <class T, int kPixels, int kVectors, bool kWhole>
void channel_tile(const ChannelRun* begin, const ChannelRun* end, const ChannelTile<T>& tile) {
  PixelSums<accumulate_t<T>, kPixels, kVectors> kept;
  for (const ChannelRun* run = begin; run != end; ++run) {
    with_count<kTapPlaces>(run->places, [&](auto n) __attribute__((always_inline)) {
      add_channel_taps<T, decltype(n)::value, kPixels, kVectors, kWhole>(*run, tile, run == begin,
                                                                         run + 1 == end, kept);
    });
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
