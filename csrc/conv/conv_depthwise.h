// fprop and dgrad of depthwise convolution of channels-last tensors on CPU: vectors along the
// channels, which are the groups.
//
// A task is a row of destination pixels, taken a few at a time (conv_depthwise_channels.h), for a
// few vectors of channels after another, so that what neighbours share stays in the cache. Its taps
// are listed once for all pixels. A strided dgrad takes its pixels phase by phase, so that all of a
// tile meet the same places. Bound: bytes where windows are small, FLOPs where they are large.
// Tried and lost: a load for each product; lists of their own for the pixels at the edges, one at a
// time.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_depthwise_channels.h"
#include "core/row_writer.h"

namespace weft::WEFT_TARGET {
namespace {

// Destination columns first + q · step, q in [0, count): at place k, q reads source column
// offset(k) + q · source_step.
struct ColumnPhase {
  int64_t first;
  int64_t step;
  int64_t count;
  int64_t source_step;
};

// The phase that begins at destination column `first`.
inline ColumnPhase column_phase(const Gather& g, const Window& w, int64_t first) {
  if (!g.transposed) return {0, 1, g.dst[2], w.stride};
  return {first, w.stride, ceil_div(g.dst[2] - first, w.stride), 1};
}

// The offset of place k; false if the phase does not meet it.
inline bool column_offset(const Gather& g, const Window& w, const ColumnPhase& phase, int64_t k,
                          int64_t* offset) {
  if (!g.transposed) {
    *offset = k * w.dilation - w.padding;
    return true;
  }
  const int64_t padded = phase.first + w.padding - k * w.dilation;
  *offset = padded / w.stride;
  return padded % w.stride == 0;
}

// Neighbouring places of a window row.
struct ColumnChunk {
  int64_t offset;  // the source column of place 0 for pixel 0
  int64_t l;       // place 0
  int64_t l_step;
  int64_t places;
};

// The chunks of one phase; returns how many there are.
inline int64_t list_column_chunks(const Gather& g, const Window& w, const ColumnPhase& phase,
                                  ColumnChunk* chunks) {
  int64_t count = 0;
  for (int64_t residue = 0; residue < phase.source_step; ++residue) {
    const int64_t begin = count;
    for (int64_t i = 0; i < w.size; ++i) {
      // Columns ascend with the place for fprop, against it for dgrad.
      const int64_t l = g.transposed ? w.size - 1 - i : i;
      int64_t offset;
      if (!column_offset(g, w, phase, l, &offset) ||
          (offset + w.padding) % phase.source_step != residue)
        continue;
      ColumnChunk* const last = chunks + count - 1;
      if (count > begin && last->places < kTapPlaces &&
          last->offset + last->places * phase.source_step == offset) {
        if (last->places++ == 1) last->l_step = l - last->l;
      } else {
        chunks[count++] = {offset, l, 0, 1};
      }
    }
  }
  return count;
}

// The taps of one row of destination pixels, in runs of equally many places whose sums are short
// enough.
class ChannelTaps {
 public:
  explicit ChannelTaps(int64_t places) : taps_(places), runs_(most(places, 1)) {}

  // Of row (d, h), whose weights [place, channel] are `row_lanes` apart.
  void list(const ConvProblem& p, const Gather& g, int64_t d, int64_t h, const ColumnChunk* chunks,
            int64_t chunk_count, int64_t row_lanes) {
    int64_t count = 0;
    run_count_ = 0;
    for (int64_t places = kTapPlaces; places > 0; --places) {
      int64_t first = count;
      const auto close = [&] {
        if (count > first) runs_[run_count_++] = {taps_.data() + first, count - first, places};
        first = count;
      };
      for (int64_t t = 0; t < p.window[0].size; ++t) {
        const int64_t slice = source_of(p.window[0], d, t, g.src[0], g.transposed);
        if (slice < 0) continue;
        for (int64_t j = 0; j < p.window[1].size; ++j) {
          const int64_t row = source_of(p.window[1], h, j, g.src[1], g.transposed);
          if (row < 0) continue;
          for (const ColumnChunk* c = chunks; c != chunks + chunk_count; ++c) {
            if (c->places != places) continue;
            const int64_t place = (t * p.window[1].size + j) * p.window[2].size + c->l;
            taps_[count++] = {((slice * g.src[1] + row) * g.src[2] + c->offset) * p.groups,
                              c->offset, place * row_lanes, c->l_step * row_lanes};
            if ((count - first) * places >= 2 * kTerms) close();
          }
        }
      }
      close();
    }
    if (run_count_ == 0) runs_[run_count_++] = {nullptr, 0, 1};  // the bias alone
  }
  const ChannelRun* begin() const { return runs_.data(); }
  const ChannelRun* end() const { return runs_.data() + run_count_; }

 private:
  Scratch<ChannelTap> taps_;
  Scratch<ChannelRun> runs_;
  int64_t run_count_ = 0;
};

// The source of the next row of destination pixels, asked for while this one is computed: rows that
// a tile reads by turns are no stream that the processor runs ahead of.
template <class T>
class NextRow {
 public:
  // After row (d, h) of an image, of which `parts` are asked for.
  NextRow(const ConvProblem& p, const Gather& g, const T* image, int64_t d, int64_t h,
          int64_t parts) {
    const Range slices = sources_of(p.window[0], d, d + 1, g.src[0], g.transposed);
    const Range rows = sources_of(p.window[1], h, h + 1, g.src[1], g.transposed);
    const int64_t row = g.src[2] * p.groups;
    const int64_t count =
        g.transposed ? ceil_div(row, p.window[1].stride) : row * p.window[1].stride;
    at_ = image + (most(slices.end - 1, 0) * g.src[1] + rows.end) * row;
    step_ = ceil_div(count, parts);
  }
  WEFT_INLINE void ask() {
    for (int64_t i = 0; i < step_; i += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(at_ + i);
    at_ += step_;
  }

 private:
  const T* at_;
  int64_t step_;
};

// Rows of destination pixels, one after another.
template <class T>
class PixelGather {
 public:
  using Acc = accumulate_t<T>;

  // `weights`: [place, lane], then the bias.
  PixelGather(const ConvProblem& p, const Gather& g, const Acc* weights)
      : p_(p),
        g_(g),
        weights_(weights),
        row_lanes_(round_up(p.groups, kLanes<T>)),
        phases_(g.transposed ? least(p.window[2].stride, g.dst[2]) : 1),
        taps_(p.window_elements()),
        chunks_(p.window[2].size),
        writer_(nullptr, g.dst[2] * p.groups,
                conv_streams(p.n * p.groups * g.dst_positions() * size_of(p.dtype))) {}

  // Goes on at row `task` of all images.
  void begin(T* dst, int64_t task) { writer_.restart(dst + task * g_.dst[2] * p_.groups); }

  // The next row, which is row `task` of all images.
  void row(const T* src, int64_t task) {
    const int64_t channels = p_.groups, places = p_.window_elements();
    const int64_t h = task % g_.dst[1];
    const int64_t d = task / g_.dst[1] % g_.dst[0];
    const T* const image = src + task / g_.dst[1] / g_.dst[0] * g_.src_positions() * channels;
    T* const to = writer_.row();
    NextRow<T> next(
        p_, g_, image, d, h,
        ceil_div(row_lanes_, kTileVectors * kLanes<T>) * ceil_div(g_.dst[2], kTilePixels));
    for (int64_t i = 0; i < phases_; ++i) {
      const ColumnPhase phase = column_phase(g_, p_.window[2], i);
      const int64_t chunk_count = list_column_chunks(g_, p_.window[2], phase, chunks_.data());
      taps_.list(p_, g_, d, h, chunks_.data(), chunk_count, row_lanes_);
      ChannelTile<T> tile{};
      tile.source_step = phase.source_step * channels;
      tile.column_step = phase.source_step;
      tile.columns = g_.src[2];
      tile.dst_step = phase.step * channels;
      for_each_vectors<T, kTileVectors>(channels, [&](auto vectors, auto whole, int64_t first) {
        tile.weights = weights_ + first;
        tile.bias = tile.weights + places * row_lanes_;
        tile.lanes = channels - first;
        in_steps<kTilePixels>(phase.count, [&](auto pixels, int64_t q) {
          next.ask();
          tile.column = q * phase.source_step;
          tile.source = image + q * tile.source_step + first;
          tile.dst = to + (phase.first + q * phase.step) * channels + first;
          channel_tile<T, decltype(pixels)::value, decltype(vectors)::value,
                       decltype(whole)::value == 1>(taps_.begin(), taps_.end(), tile);
        });
      });
    }
    activate_row(p_, to, g_.dst[2] * channels);
    writer_.advance(g_.dst[2] * channels);
  }

 private:
  const ConvProblem& p_;
  const Gather& g_;
  const Acc* weights_;
  int64_t row_lanes_, phases_;
  ChannelTaps taps_;
  Scratch<ColumnChunk> chunks_;
  RowWriter<T> writer_;
};

// [place, lane], then the bias.
template <class T>
class PixelWeights {
 public:
  using Acc = accumulate_t<T>;

  PixelWeights(const ConvProblem& p, const T* weights, const T* bias)
      : data_((p.window_elements() + 1) * round_up(p.groups, kLanes<T>)) {
    const int64_t row_lanes = round_up(p.groups, kLanes<T>), places = p.window_elements();
    for (int64_t place = 0; place <= places; ++place)
      for (int64_t c = 0; c < row_lanes; ++c) {
        Acc value = 0;
        if (c < p.groups && place < places) value = widen(weights[c * places + place]);
        if (c < p.groups && place == places && bias != nullptr) value = widen(bias[c]);
        data_[place * row_lanes + c] = value;
      }
  }
  const Acc* data() const { return data_.data(); }

 private:
  Scratch<Acc> data_;
};

template <class T>
void depthwise_gather(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                      const T* bias, T* dst, const Context& context) {
  const PixelWeights<T> packed(p, weights, bias);
  parallel_for(context, p.n * g.dst[0] * g.dst[1], 1, [&](int64_t begin, int64_t end) {
    PixelGather<T> gather(p, g, packed.data());
    gather.begin(dst, begin);
    for (int64_t task = begin; task < end; ++task) gather.row(src, task);
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
