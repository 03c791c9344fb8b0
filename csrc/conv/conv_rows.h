// Convolution of contiguous tensors on CPU: vectors along a row.
//
// A task copies the source rows that a band of destination rows reads into scratch, widened to the
// accumulation type, with their padding, and split by the stride's phases (columns 0, s, 2s, ...,
// then 1, s+1, ...), so that every window place reads consecutive columns. A tile of a few
// destination channels × a few vectors of a row then stays in registers while all source channels
// and places are added: per place one load a vector and one broadcast a channel. dgrad is the same
// with roles exchanged, a strided one phase by phase of its destination columns. wgrad keeps a tile
// of places × channels in registers, each a vector that is folded at the end. Bound: FLOPs for
// dense problems, the copy and the row's few FMAs for depthwise ones. Rows much shorter than a
// vector waste it.
#pragma once

#include "conv/conv_gather.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace weft::WEFT_TARGET {
namespace {

// Accumulators of a tile that the target's registers hold: channels × vectors.
#if defined(__AVX512F__)
inline constexpr int kMaxStrip = 4;
inline constexpr int kWgradPlaces = 4;
#else
inline constexpr int kMaxStrip = 2;
inline constexpr int kWgradPlaces = 2;
#endif
inline constexpr int kWgradChannels = 4;
inline constexpr int64_t kScratchElements = 48 * 1024;

// A source row in scratch: column i of the source is at phase (i + lead) % phases, place
// (i + lead) / phases of that phase.
struct RowLayout {
  int64_t phases;
  int64_t pitch;  // of one phase
  int64_t lead;

  int64_t row() const { return phases * pitch; }
};

template <class T>
RowLayout row_layout(const Gather& g, const Window& w) {
  const int64_t before = (w.span() - 1) / w.stride;
  if (g.transposed)
    return {1, before + (g.dst[2] - 1 + w.padding) / w.stride + 1 + kLanes<T>, before};
  return {w.stride, before + round_up(g.dst[2], kLanes<T>), w.padding};
}

template <class T>
void copy_row(accumulate_t<T>* out, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(out + i, load_vec(in + i));
  for (; i < count; ++i) out[i] = widen(in[i]);
}

template <class T>
void fill_row(accumulate_t<T>* out, const T* in, int64_t extent, const RowLayout& layout) {
  using Acc = accumulate_t<T>;
  for (int64_t phase = 0; phase < layout.phases; ++phase, out += layout.pitch) {
    const int64_t offset = layout.lead - phase;
    const int64_t begin = offset > 0 ? least(ceil_div(offset, layout.phases), layout.pitch) : 0;
    const int64_t available = extent + offset;
    const int64_t end =
        most(begin, available > 0 ? least(ceil_div(available, layout.phases), layout.pitch) : 0);
    fill(out, begin, Acc{0});
    const T* from = in + begin * layout.phases - offset;
    if (layout.phases == 1)
      copy_row(out + begin, from, end - begin);
    else
      for (int64_t i = begin; i < end; ++i, from += layout.phases) out[i] = widen(*from);
    fill(out + end, layout.pitch - end, Acc{0});
  }
}

// One place of the window, as offsets into a channel's scratch and into its weights.
struct Tap {
  int64_t source;
  int64_t weight;
};

// ---- fprop and dgrad ---------------------------------------------------------------------------

template <class T>
struct RowTile {
  using Acc = accumulate_t<T>;
  const Acc* source;
  int64_t source_step;  // from channel to channel
  int64_t channels;     // of the source
  const Tap* taps;
  int64_t tap_count;
  const Acc* weight;
  int64_t weight_source_step;
  int64_t weight_step;  // from destination channel to destination channel
  const T* bias;        // may be null
  T* out;
  int64_t out_step;    // from channel to channel
  int64_t out_stride;  // from column to column
};

template <class T>
WEFT_INLINE void store_strided(T* out, Vec<accumulate_t<T>> value, int count, int64_t stride) {
  if (stride == 1) {
    if (count == kLanes<T>)
      store_vec(out, value);
    else
      store_part(out, value, count);
    return;
  }
  T lanes[kLanes<T>];
  store_vec(lanes, value);
  for (int i = 0; i < count; ++i) out[i * stride] = lanes[i];
}

// `columns` columns of kChannels rows, kVectors vectors wide.
template <class T, int kChannels, int kVectors>
void row_tile(const RowTile<T>& t, int64_t columns) {
  using Acc = accumulate_t<T>;
  using V = Vec<Acc>;
  V sum[kChannels][kVectors];
  for (int k = 0; k < kChannels; ++k)
    for (int v = 0; v < kVectors; ++v)
      sum[k][v] = V{} + (t.bias != nullptr ? widen(t.bias[k]) : Acc{0});
  for (int64_t c = 0; c < t.channels; ++c) {
    const Acc* source = t.source + c * t.source_step;
    const Acc* weight = t.weight + c * t.weight_source_step;
    for (const Tap* tap = t.taps; tap != t.taps + t.tap_count; ++tap) {
      V x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load_vec(source + tap->source + v * kLanes<T>);
      for (int k = 0; k < kChannels; ++k) {
        const Acc w = weight[tap->weight + k * t.weight_step];
        for (int v = 0; v < kVectors; ++v) sum[k][v] += w * x[v];
      }
    }
  }
  for (int k = 0; k < kChannels; ++k)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = v * kLanes<T>;
      store_strided(t.out + k * t.out_step + first * t.out_stride, sum[k][v],
                    static_cast<int>(least(columns - first, kLanes<T>)), t.out_stride);
    }
}

template <class T, int kChannels>
void row_strip(const RowTile<T>& tile, int64_t columns) {
  RowTile<T> t = tile;
  constexpr int64_t kWidth = kMaxStrip * kLanes<T>;
  for (; columns > 0; columns -= kWidth, t.source += kWidth, t.out += kWidth * t.out_stride) {
    const int64_t width = least(columns, kWidth);
    const int64_t vectors = ceil_div(width, kLanes<T>);
    if (vectors == 1) {
      row_tile<T, kChannels, 1>(t, width);
    } else if (vectors == 2) {
      row_tile<T, kChannels, 2>(t, width);
    } else if constexpr (kMaxStrip == 4) {
      if (vectors == 3)
        row_tile<T, kChannels, 3>(t, width);
      else
        row_tile<T, kChannels, 4>(t, width);
    }
  }
}

template <class T>
void advance(RowTile<T>& t, int64_t channels) {
  t.weight += channels * t.weight_step;
  t.out += channels * t.out_step;
  if (t.bias != nullptr) t.bias += channels;
}

// How many destination channels a tile takes of the `left` ones: narrow rows need more of them to
// keep the FMA units busy.
template <class T>
int64_t tile_channels(int64_t left, int64_t columns) {
  if (left >= 8 && columns <= kLanes<T>) return 8;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class T>
void row_channels(const RowTile<T>& tile, int64_t channels, int64_t columns) {
  switch (channels) {
    case 8:
      return row_tile<T, 8, 1>(tile, columns);
    case 4:
      return row_strip<T, 4>(tile, columns);
    case 2:
      return row_strip<T, 2>(tile, columns);
    default:
      return row_strip<T, 1>(tile, columns);
  }
}

// Weights in the accumulation type: themselves, or a widened copy of half ones.
template <class T>
class WideWeights {
 public:
  using Acc = accumulate_t<T>;
  WideWeights(const T* weights, int64_t count)
      : copy_(kSame ? 0 : count), data_(reinterpret_cast<const Acc*>(weights)) {
    if (kSame) return;
    copy_row(copy_.data(), weights, count);
    data_ = copy_.data();
  }
  const Acc* data() const { return data_; }

 private:
  static constexpr bool kSame = sizeof(T) == sizeof(Acc);
  Scratch<Acc> copy_;
  const Acc* data_;
};

// Columns of one phase of the destination: first, first + phases, ...
struct ColumnPhase {
  int64_t first;
  int64_t count;
  int64_t source;  // scratch column, less that of the tap, from which `first` reads
};

inline ColumnPhase column_phase(const Gather& g, const Window& w, int64_t phase) {
  if (!g.transposed) return {0, g.dst[2], 0};
  const int64_t first = ((phase - w.padding) % w.stride + w.stride) % w.stride;
  const int64_t count = first < g.dst[2] ? ceil_div(g.dst[2] - first, w.stride) : 0;
  return {first, count, (first + w.padding) / w.stride};
}

// The places of destination row (d, h) that read a source row, sorted by the phase of their
// columns; phase f has taps [begin[f], begin[f + 1]).
inline void list_taps(const ConvProblem& p, const Gather& g, const RowLayout& layout, int64_t d,
                      int64_t h, const Range& slices, const Range& rows, Tap* taps,
                      int64_t* begin) {
  const Window& columns = p.window[2];
  const int64_t phases = g.transposed ? columns.stride : 1;
  int64_t count = 0;
  for (int64_t phase = 0; phase < phases; ++phase) {
    begin[phase] = count;
    for (int64_t i = 0; i < p.window[0].size; ++i) {
      const int64_t slice = source_of(p.window[0], d, i, g.src[0], g.transposed);
      if (slice < 0) continue;
      for (int64_t j = 0; j < p.window[1].size; ++j) {
        const int64_t row = source_of(p.window[1], h, j, g.src[1], g.transposed);
        if (row < 0) continue;
        const int64_t in_scratch =
            ((slice - slices.begin) * (rows.end - rows.begin) + row - rows.begin) * layout.row();
        for (int64_t l = 0; l < columns.size; ++l) {
          const int64_t offset = l * columns.dilation;
          const int64_t shift = offset / columns.stride;
          int64_t column = offset % columns.stride * layout.pitch + shift;
          if (g.transposed) {
            if (offset % columns.stride != phase) continue;
            column = layout.lead - shift;
          }
          taps[count++] = {in_scratch + column, (i * p.window[1].size + j) * columns.size + l};
        }
      }
    }
  }
  begin[phases] = count;
}

// Destination rows of a task: as many as have their source rows in `kScratchElements`.
inline int64_t band_rows(const Window& w, int64_t row_elements, const Gather& g) {
  const int64_t source_rows = kScratchElements / row_elements;
  const int64_t rows = g.transposed ? (source_rows - 1) * w.stride - w.span() + 2
                                    : (source_rows - w.span()) / w.stride + 1;
  return least(most(rows, 1), g.dst[1]);
}

template <class T>
void gather_rows(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                 const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t places = p.window_elements();
  const RowLayout layout = row_layout<T>(g, p.window[2]);
  const int64_t max_slices = least(p.window[0].span(), g.src[0]);
  const int64_t band = band_rows(p.window[1], g.src_channels * max_slices * layout.row(), g);
  const int64_t bands = ceil_div(g.dst[1], band);
  const int64_t max_rows =
      least(g.transposed ? (band + p.window[1].span() - 2) / p.window[1].stride + 1
                         : (band - 1) * p.window[1].stride + p.window[1].span(),
            g.src[1]);
  const int64_t phases = g.transposed ? p.window[2].stride : 1;
  const WideWeights<T> wide(weights, p.weight_elements());

  parallel_for(context, p.n * p.groups * g.dst[0] * bands, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> scratch(g.src_channels * max_slices * max_rows * layout.row());
    Scratch<Tap> taps(band * places);
    Scratch<int64_t> tap_begin(band * (phases + 1));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_row = task % bands * band;
      const int64_t last_row = least(first_row + band, g.dst[1]);
      const int64_t d = task / bands % g.dst[0];
      const int64_t image_group = task / bands / g.dst[0];
      const int64_t group = image_group % p.groups;
      const Range slices = sources_of(p.window[0], d, d + 1, g.src[0], g.transposed);
      const Range rows = sources_of(p.window[1], first_row, last_row, g.src[1], g.transposed);
      const int64_t channel_elements =
          (slices.end - slices.begin) * (rows.end - rows.begin) * layout.row();

      const T* image = src + image_group * g.src_channels * g.src_positions();
      Acc* out = scratch.data();
      for (int64_t c = 0; c < g.src_channels; ++c)
        for (int64_t i = slices.begin; i < slices.end; ++i)
          for (int64_t j = rows.begin; j < rows.end; ++j, out += layout.row())
            fill_row(out, image + ((c * g.src[0] + i) * g.src[1] + j) * g.src[2], g.src[2], layout);
      for (int64_t h = first_row; h < last_row; ++h)
        list_taps(p, g, layout, d, h, slices, rows, taps.data() + (h - first_row) * places,
                  tap_begin.data() + (h - first_row) * (phases + 1));

      RowTile<T> tile{};
      tile.source_step = channel_elements;
      tile.channels = g.src_channels;
      tile.weight = wide.data() + group * p.k * p.c * places;
      tile.weight_source_step = g.transposed ? p.c * places : places;
      tile.weight_step = g.transposed ? places : p.c * places;
      tile.bias = bias != nullptr ? bias + group * g.dst_channels : nullptr;
      tile.out_step = g.dst_positions();
      tile.out_stride = phases;
      tile.out = dst + image_group * g.dst_channels * g.dst_positions();
      const int64_t widest = ceil_div(g.dst[2], phases);
      for (int64_t k = 0; k < g.dst_channels;) {
        const int64_t channels = tile_channels<T>(g.dst_channels - k, widest);
        for (int64_t h = first_row; h < last_row; ++h)
          for (int64_t phase = 0; phase < phases; ++phase) {
            const ColumnPhase columns = column_phase(g, p.window[2], phase);
            if (columns.count == 0) continue;
            const int64_t* list = tap_begin.data() + (h - first_row) * (phases + 1) + phase;
            RowTile<T> row = tile;
            row.taps = taps.data() + (h - first_row) * places + list[0];
            row.tap_count = list[1] - list[0];
            row.source = scratch.data() + columns.source;
            row.out += (d * g.dst[1] + h) * g.dst[2] + columns.first;
            row_channels(row, channels, columns.count);
          }
        advance(tile, channels);
        k += channels;
      }
    }
  });
}

// ---- wgrad -------------------------------------------------------------------------------------

// Scratch of a few images: padded input rows of some channels, gradient rows of all.
struct WgradScratch {
  int64_t images;
  int64_t rows;     // of the output
  int64_t x_image;  // elements of one image
  int64_t gy_image;
  int64_t x_row_step;  // from output row to output row
  int64_t gy_row;      // a gradient row, a whole number of vectors
  int64_t gy_channel;
};

template <class Acc>
struct LaneMask {
  using type = Vec<int32_t>;
};
template <>
struct LaneMask<double> {
  using type = Vec<int64_t>;
};

// Adds to sums[i · sum_step + k] what the scratch holds, for kPlaces taps i and kChannels channels
// k.
template <class Acc, int kPlaces, int kChannels>
void wgrad_tile(const WgradScratch& s, const Acc* x, const Acc* gy, const int64_t* places,
                int64_t columns, Acc* const* sums, int64_t sum_step) {
  using V = Vec<Acc>;
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  typename LaneMask<Acc>::type inside;
  for (int i = 0; i < kCount; ++i) inside[i] = i < columns % kCount ? -1 : 0;
  V sum[kPlaces][kChannels] = {};
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t row = 0; row < s.rows; ++row) {
      const Acc* x_row = x + n * s.x_image + row * s.x_row_step;
      const Acc* gy_row = gy + n * s.gy_image + row * s.gy_row;
      int64_t column = 0;
      V g[kChannels];
      for (; column + kCount <= columns; column += kCount) {
        for (int k = 0; k < kChannels; ++k) g[k] = load_vec(gy_row + k * s.gy_channel + column);
        for (int i = 0; i < kPlaces; ++i) {
          const V value = load_vec(x_row + places[i] + column);
          for (int k = 0; k < kChannels; ++k) sum[i][k] += value * g[k];
        }
      }
      if (column == columns) continue;
      // Past the row's end the gradient is zero, but the input may be infinite.
      for (int k = 0; k < kChannels; ++k) g[k] = load_vec(gy_row + k * s.gy_channel + column);
      for (int i = 0; i < kPlaces; ++i) {
        const V value = load_vec(x_row + places[i] + column);
        const V kept = inside ? value : V{};
        for (int k = 0; k < kChannels; ++k) sum[i][k] += kept * g[k];
      }
    }
  for (int i = 0; i < kPlaces; ++i)
    for (int k = 0; k < kChannels; ++k) sums[i][k * sum_step] += sum_of_lanes<Acc>(sum[i][k]);
}

template <class Acc, int kPlaces>
void wgrad_channels(const WgradScratch& s, const Acc* x, const Acc* gy, const int64_t* places,
                    int64_t columns, Acc* const* sums, int64_t sum_step, int64_t channels) {
  int64_t k = 0;
  Acc* at[kPlaces];
  const auto move = [&] {
    for (int i = 0; i < kPlaces; ++i) at[i] = sums[i] + k * sum_step;
    return gy + k * s.gy_channel;
  };
  for (; k + kWgradChannels <= channels; k += kWgradChannels) {
    const Acc* from = move();
    wgrad_tile<Acc, kPlaces, kWgradChannels>(s, x, from, places, columns, at, sum_step);
  }
  for (; k < channels; ++k) {
    const Acc* from = move();
    wgrad_tile<Acc, kPlaces, 1>(s, x, from, places, columns, at, sum_step);
  }
}

template <class T>
void wgrad_rows(const ConvProblem& p, const T* x, const T* gy, T* gw, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t window_places = p.window_elements();
  const RowLayout layout = row_layout<T>(fprop_gather(p), p.window[2]);
  const int64_t gy_row = round_up(p.out[2], kLanes<T>);
  // Enough input channels at a time that copying the gradient's rows is little work.
  const int64_t block = least(p.c, most(1, ceil_div(32, window_places)));
  const int64_t blocks = ceil_div(p.c, block);
  const int64_t input_row = block * p.window[0].size * layout.row();
  const auto scratch_rows = [&](int64_t rows) {
    return (rows - 1) * p.window[1].stride + p.window[1].span();
  };
  const auto elements = [&](int64_t rows) {
    return scratch_rows(rows) * input_row + rows * p.k * gy_row;
  };
  int64_t band = p.out[1];
  while (band > 1 && elements(band) > kScratchElements) band = (band + 1) / 2;
  const int64_t images =
      band < p.out[1] ? 1 : most(1, least(p.n, kScratchElements / elements(band)));
  const int64_t chunks = image_chunks(ceil_div(p.n, images), p.groups * blocks);
  const int64_t chunk_images = round_up(ceil_div(p.n, chunks), images);

  const int64_t count = p.weight_elements();
  Scratch<Acc> partial(chunks * count);
  parallel_for(context, chunks * p.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    WgradScratch s{};
    s.x_image = scratch_rows(band) * input_row;
    s.gy_image = band * p.k * gy_row;
    s.x_row_step = p.window[1].stride * layout.row();
    s.gy_row = gy_row;
    Scratch<Acc> x_scratch(images * s.x_image);
    Scratch<Acc> gy_scratch(images * s.gy_image);
    Scratch<int64_t> places(block * window_places);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_c = task % blocks * block;
      const int64_t channels = least(block, p.c - first_c);
      const int64_t group = task / blocks % p.groups;
      const int64_t chunk = task / blocks / p.groups;
      const int64_t taps = channels * window_places;
      // Weight (k, c, place) of this task is at sums[k · C · places + (c − first_c) · places +
      // place].
      Acc* sums = partial.data() + chunk * count + (group * p.k * p.c + first_c) * window_places;
      for (int64_t k = 0; k < p.k; ++k) fill(sums + k * p.c * window_places, taps, Acc{0});
      const int64_t last = least(p.n, (chunk + 1) * chunk_images);
      for (int64_t n = chunk * chunk_images; n < last; n += images)
        for (int64_t d = 0; d < p.out[0]; ++d)
          for (int64_t first_row = 0; first_row < p.out[1]; first_row += band) {
            s.images = least(images, last - n);
            s.rows = least(band, p.out[1] - first_row);
            s.gy_channel = s.rows * gy_row;
            const int64_t rows = scratch_rows(s.rows);
            const int64_t first_input = p.window[1].first_input(first_row);
            for (int64_t i = 0; i < s.images; ++i) {
              Acc* to = x_scratch.data() + i * s.x_image;
              for (int64_t c = 0; c < channels; ++c)
                for (int64_t t = 0; t < p.window[0].size; ++t) {
                  const int64_t slice = source_of(p.window[0], d, t, p.in[0], false);
                  const int64_t channel = ((n + i) * p.groups + group) * p.c + first_c + c;
                  for (int64_t r = 0; r < rows; ++r, to += layout.row()) {
                    const int64_t h = first_input + r;
                    if (slice < 0 || h < 0 || h >= p.in[1])
                      fill(to, layout.row(), Acc{0});
                    else
                      fill_row(to, x + ((channel * p.in[0] + slice) * p.in[1] + h) * p.in[2],
                               p.in[2], layout);
                  }
                }
              to = gy_scratch.data() + i * s.gy_image;
              for (int64_t k = 0; k < p.k; ++k) {
                const int64_t channel = ((n + i) * p.groups + group) * p.k + k;
                const T* from = gy + ((channel * p.out[0] + d) * p.out[1] + first_row) * p.out[2];
                for (int64_t r = 0; r < s.rows; ++r, to += gy_row, from += p.out[2]) {
                  copy_row(to, from, p.out[2]);
                  fill(to + p.out[2], gy_row - p.out[2], Acc{0});
                }
              }
            }
            for (int64_t tap = 0; tap < taps; ++tap) {
              const int64_t l = tap % p.window[2].size * p.window[2].dilation;
              const int64_t j = tap / p.window[2].size % p.window[1].size * p.window[1].dilation;
              const int64_t slice = tap / p.window[2].size / p.window[1].size;
              places[tap] = (slice * rows + j) * layout.row() +
                            l % p.window[2].stride * layout.pitch + l / p.window[2].stride;
            }
            const int64_t sum_step = p.c * window_places;
            Acc* at[kWgradPlaces];
            int64_t tap = 0;
            for (; tap + kWgradPlaces <= taps; tap += kWgradPlaces) {
              for (int i = 0; i < kWgradPlaces; ++i) at[i] = sums + tap + i;
              wgrad_channels<Acc, kWgradPlaces>(s, x_scratch.data(), gy_scratch.data(),
                                                places.data() + tap, p.out[2], at, sum_step, p.k);
            }
            for (; tap < taps; ++tap) {
              at[0] = sums + tap;
              wgrad_channels<Acc, 1>(s, x_scratch.data(), gy_scratch.data(), places.data() + tap,
                                     p.out[2], at, sum_step, p.k);
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

template <class T>
void bias_grad_rows(const ConvProblem& p, const T* gy, T* gb, const Context& context) {
  using Acc = accumulate_t<T>;
  const int64_t positions = p.out_positions();
  const int64_t channels = p.out_channels();
  parallel_for(context, channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Acc total = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        const T* from = gy + (n * channels + k) * positions;
        Vec<Acc> sum[4] = {};
        int64_t i = 0;
        for (; i + 4 * kLanes<T> <= positions; i += 4 * kLanes<T>)
          for (int v = 0; v < 4; ++v) sum[v] += load_vec(from + i + v * kLanes<T>);
        Acc rest = 0;
        for (; i < positions; ++i) rest += widen(from[i]);
        total += sum_of_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
      }
      gb[k] = narrow<T>(total);
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
