// Depthwise convolution of contiguous tensors on CPU: vectors along W, shared between rows.
//
// A task is a band of destination rows of one plane, whose source is copied into scratch
// (conv_row_taps.h); tiles of it stay in registers (conv_row_tile.h), or, where windows are small,
// rows go through registers one after another (conv_row_stream.h). Strided dgrad goes phase by
// phase; the two column phases of stride 2 are zipped on the way out. Bound: bytes where windows
// are small, FLOPs where they are large. Tried and lost: flat runs over the whole band, whose
// loads, one a product, cross cache lines; they remain for planes of several channels.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_row_stream.h"
#include "core/row_writer.h"

namespace weft::WEFT_TARGET {
namespace {

// One phase of a band's destination.
struct RowPhase {
  AxisPhase rows;
  AxisPhase columns;
  RowTaps::Runs runs;
};

// to[i · step] = from[i], or both phases of step 2 at once, which are read in whole vectors.
template <class T>
void scatter_row(T* __restrict to, const accumulate_t<T>* __restrict from, int64_t count,
                 int64_t step) {
  for (int64_t i = 0; i < count; ++i) to[i * step] = narrow<T>(from[i]);
}
template <class T>
void zip_rows(T* __restrict to, const accumulate_t<T>* __restrict even,
              const accumulate_t<T>* __restrict odd, int64_t pairs) {
  for (int64_t i = 0; i < pairs; i += kLanes<T>) {
    Vec<accumulate_t<T>> low = load_vec(even + i), high = load_vec(odd + i);
    zip(low, high);
    const int64_t left = 2 * (pairs - i);
    store_lanes(to + 2 * i, low, left);
    if (left > kLanes<T>) store_lanes(to + 2 * i + kLanes<T>, high, left - kLanes<T>);
  }
}

// fprop or dgrad of one band of destination rows, plane after plane.
template <class T>
class RowGather {
 public:
  using Acc = accumulate_t<T>;

  RowGather(const ConvProblem& p, const Gather& g, const Acc* weights, const T* bias)
      : p_(p),
        g_(g),
        weights_(weights),
        bias_(bias),
        column_phases_(g.transposed ? p.window[2].stride : 1),
        phases_(column_phases_ * (g.transposed ? p.window[1].stride : 1)),
        taps_(p),
        phase_(phases_),
        stream_step_(most(kStreamRows, kStreamElements / g.dst[2])),
        writer_(nullptr, stream_step_ * g.dst[2],
                conv_streams(p.n * p.groups * g.dst_positions() * size_of(p.dtype))) {}

  // The band: destination rows [first, last) of slice `d`.
  void reset(int64_t d, int64_t first, int64_t last) {
    source_.reset(p_, g_, d, first, last, (kRowVectors + 1) * kLane);
    slice_ = d * g_.dst[1] * g_.dst[2];
    rows_ = {first, last};
    taps_.clear();
    int64_t tile_count = 0;
    for (int64_t i = 0; i < phases_; ++i) {
      RowPhase& phase = phase_[i];
      phase.rows = axis_phase(p_.window[1], first, last, i / column_phases_, g_.transposed);
      phase.columns = axis_phase(p_.window[2], 0, g_.dst[2], i % column_phases_, g_.transposed);
      phase.runs = taps_.list(p_, g_, source_.planes(), d, phase.rows, phase.columns);
      tile_count += row_tiles(ceil_div(phase.columns.count, kLane), phase.rows.count);
    }
    asked_ = ceil_div(source_.lines(g_), most(tile_count, 1));
    of_phase_ = 0;
    for (int64_t i = 0; i < phases_; ++i)
      of_phase_ = most(of_phase_, phase_[i].rows.count * sum_step(i));
    out_.resize(most(phases_ * of_phase_, 16 * kLane));
  }

  // `count` planes of src to those of dst, of which the first is one of `channel`. `ahead` planes,
  // which may be more, are asked for.
  void run(const T* src, T* dst, int64_t count, int64_t channel, int64_t ahead) {
    const int64_t src_plane = g_.src_positions();
    for (int64_t first = 0; first < count; first += source_.held()) {
      const int64_t held = least(source_.held(), count - first);
      for (int64_t i = 0; i < held; ++i) source_.load(p_, g_, src + (first + i) * src_plane, i);
      for (int64_t i = 0; i < held; ++i) {
        const int64_t next = least(first + i + source_.held(), ahead - 1);
        plane(i, channel, src + next * src_plane, dst + (first + i) * g_.dst_positions() + slice_);
        if (++channel == p_.groups) channel = 0;
      }
    }
  }
  // How many planes are gathered at a time.
  int64_t held() const { return source_.held(); }

 private:
  static constexpr int64_t kLane = kLanes<T>;
  static constexpr int64_t kStreamRows = 8, kStreamElements = 2048;

  // What a tile needs beside its place.
  struct PlaneOf {
    const Acc* source;
    const Acc* weights;
    Acc start;
    const T* next;  // a plane to be asked for meanwhile
  };

  // The slice of one plane, which is the i-th one held.
  void plane(int64_t i, int64_t channel, const T* next, T* slice) {
    const PlaneOf plane = {source_.data(i), weights_ + channel * p_.window_elements(),
                           bias_ != nullptr ? widen(bias_[channel]) : Acc{0}, next};
    tile_ = 0;
    if (phases_ == 1) {
      T* const to = slice + rows_.begin * g_.dst[2];
      return whole_rows(plane, phase_[0], to);
    }
    for (int64_t i = 0; i < phases_; ++i) {
      if (streams_rows(phase_[i].runs))
        stream_phase(plane, i);
      else
        tiles(phase_[i], [&](auto vectors, auto rows, int64_t column, int64_t row) {
          tile<decltype(vectors)::value, decltype(rows)::value>(
              plane, phase_[i], column, row,
              {sums_of(i, row) + column, sum_step(i), decltype(vectors)::value * kLane,
               plane.start});
        });
    }
    const Window& window = p_.window[1];
    writer_.restart(slice + rows_.begin * g_.dst[2]);
    for (int64_t row = rows_.begin; row < rows_.end; ++row) {
      const int64_t first = (row + window.padding) % window.stride * column_phases_;
      const AxisPhase& rows = phase_[first].rows;
      join_phases(first, (row - rows.first) / rows.step, writer_.row());
      writer_.advance(g_.dst[2]);
    }
  }

  template <class Body>
  WEFT_INLINE void tiles(const RowPhase& phase, const Body& body) const {
    for_each_row_tile(ceil_div(phase.columns.count, kLane), phase.rows.count,
                      [&](auto vectors, auto rows, int64_t vector, int64_t row) {
                        body(vectors, rows, vector * kLane, row);
                      });
  }
  template <int kVectors, int kRows>
  WEFT_INLINE void tile(const PlaneOf& plane, const RowPhase& phase, int64_t column, int64_t row,
                        const RowSums<Acc>& to) {
    const int64_t pitch = source_.planes().pitch;
    source_.ask(g_, plane.next, tile_++, asked_);
    row_tile<Acc, kVectors, kRows>(phase.runs, plane.source + row * pitch + column, pitch, row,
                                   plane.weights, to);
  }

  // The only phase, whose rows are the destination's.
  void whole_rows(const PlaneOf& plane, const RowPhase& phase, T* to) {
    const int64_t width = g_.dst[2];
    if (streams_rows(phase.runs)) return streamed_rows(plane, phase, to);
    tiles(phase, [&](auto vectors, auto rows, int64_t column, int64_t row) {
      constexpr int kVectors = decltype(vectors)::value, kRows = decltype(rows)::value;
      constexpr int64_t kStep = kVectors * kLane;
      T* const at = to + row * width + column;
      const int64_t lanes = least(width - column, kStep);
      if constexpr (Widened<T>::kCopies) {
        tile<kVectors, kRows>(plane, phase, column, row, {out_.data(), kStep, kStep, plane.start});
        for (int r = 0; r < kRows; ++r) narrow_row(at + r * width, out_.data() + r * kStep, lanes);
      } else {
        tile<kVectors, kRows>(plane, phase, column, row, {at, width, lanes, plane.start});
      }
    });
    activate_row(p_, to, phase.rows.count * width);
  }
  // The same where windows are small, in steps of rows that stay in the cache.
  void streamed_rows(const PlaneOf& plane, const RowPhase& phase, T* to) {
    const int64_t width = g_.dst[2], pitch = source_.planes().pitch;
    const T* const ahead = plane.next + source_.begin(g_);
    writer_.restart(to);
    for (int64_t row = 0; row < phase.rows.count; row += stream_step_) {
      const int64_t rows = least(stream_step_, phase.rows.count - row);
      T* const at = writer_.row();
      in_steps<kRowVectors>(ceil_div(width, kLane), [&](auto vectors, int64_t vector) {
        constexpr int kVectors = decltype(vectors)::value;
        const int64_t column = vector * kLane;
        RowSums<Acc> sums = {out_.data() + column, round_up(width, kLane), kVectors * kLane,
                             plane.start};
        if constexpr (!Widened<T>::kCopies)
          sums = {at + column, width, least(width - column, kVectors * kLane), plane.start};
        stream<kVectors>(*phase.runs.begin, plane.source + row * pitch + column, rows,
                         plane.weights, sums, {ahead + row * g_.src[2] + column, g_.src[2]});
      });
      if constexpr (Widened<T>::kCopies)
        for (int64_t r = 0; r < rows; ++r)
          narrow_row(at + r * width, out_.data() + r * round_up(width, kLane), width);
      activate_row(p_, at, rows * width);
      writer_.advance(rows * width);
    }
  }
  template <int kVectors>
  void stream(const TapRun& run, const Acc* source, int64_t rows, const Acc* weights,
              const RowSums<Acc>& sums, const RowsAhead<T>& ahead) {
    const int64_t pitch = source_.planes().pitch;
    with_count<kStreamPlaces>(run.places, [&](auto places) {
      with_count<kStreamTaps>(run.count, [&](auto taps) {
        stream_rows<T, decltype(places)::value, decltype(taps)::value, kVectors>(
            run, source, pitch, rows, weights, sums, ahead);
      });
    });
  }

  // The sums of phase `i` of several, where its window is small.
  void stream_phase(const PlaneOf& plane, int64_t i) {
    const RowPhase& phase = phase_[i];
    // The first phase asks for all.
    const T* const ahead = plane.next + source_.begin(g_);
    in_steps<kRowVectors>(ceil_div(phase.columns.count, kLane), [&](auto vectors, int64_t vector) {
      constexpr int kVectors = decltype(vectors)::value;
      const int64_t column = vector * kLane;
      stream<kVectors>(*phase.runs.begin, plane.source + column, phase.rows.count, plane.weights,
                       {sums_of(i, 0) + column, sum_step(i), kVectors * kLane, plane.start},
                       i == 0 ? RowsAhead<T>{ahead + column, g_.src[2]} : RowsAhead<T>{ahead, 0});
    });
  }

  // Where the sums of phase `i` lie.
  Acc* sums_of(int64_t i, int64_t row) { return out_.data() + i * of_phase_ + row * sum_step(i); }
  int64_t sum_step(int64_t i) const { return round_up(phase_[i].columns.count, kLane); }

  // One destination row of all column phases, from phase `first` on.
  void join_phases(int64_t first, int64_t row, T* to) {
    const RowPhase* const phases = &phase_[first];
    int64_t zipped = 0;
    if (column_phases_ == 2) {
      const int64_t front = phases[0].columns.first > 0 ? 1 : 0;
      zipped = g_.dst[2] / 2;
      zip_rows(to, sums_of(first + front, row), sums_of(first + 1 - front, row), zipped);
    }
    for (int64_t i = 0; i < column_phases_; ++i) {
      const AxisPhase& columns = phases[i].columns;
      if (columns.count > zipped)
        scatter_row(to + columns.first + zipped * columns.step, sums_of(first + i, row) + zipped,
                    columns.count - zipped, columns.step);
    }
    activate_row(p_, to, g_.dst[2]);
  }

  const ConvProblem& p_;
  const Gather& g_;
  const Acc* weights_;
  const T* bias_;
  int64_t column_phases_, phases_;
  RowBand<T> source_;
  RowTaps taps_;
  Scratch<RowPhase> phase_;
  Scratch<Acc> out_;
  int64_t stream_step_;  // rows
  RowWriter<T> writer_;
  int64_t slice_ = 0, of_phase_ = 0, tile_ = 0, asked_ = 0;
  Range rows_{};
};

template <class T>
void gather_rows(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                 const T* bias, T* dst, const Context& context) {
  const int64_t band = band_rows(p, g, kBandElements);
  const int64_t bands = ceil_div(g.dst[1], band);
  const int64_t planes = p.n * p.groups;
  const Widened<T> wide(weights, p.weight_elements(), context);
  // Tasks of one band follow one another: they share taps, and padding that stays zero.
  parallel_for(context, g.dst[0] * bands * planes, 1, [&](int64_t begin, int64_t end) {
    RowGather<T> gather(p, g, wide.data(), bias);
    while (begin < end) {
      const int64_t row = begin / planes % bands * band;
      const int64_t plane = begin % planes;
      const int64_t last = least(planes, plane + end - begin);
      gather.reset(begin / planes / bands, row, least(row + band, g.dst[1]));
      gather.run(src + plane * g.src_positions(), dst + plane * g.dst_positions(), last - plane,
                 plane % p.groups, last - plane);
      begin += last - plane;
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
