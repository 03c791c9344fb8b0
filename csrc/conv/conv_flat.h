// fprop and dgrad of contiguous tensors by windows of one place on CPU: a matrix product for each
// image, vectors along its positions.
//
// A task is a panel, a few vectors of positions of one group of an image, and all rows of the
// weights, or a block of them where images are small and few. Its channels are copied as they lie,
// term after term, and are panel B of the batch-reduce product of gemm/packed_cpu.h; the weights of
// a destination channel are a row of A. A run of terms stays in the first-level
// cache while all rows go through it, the sums of earlier runs in the second-level one; the last
// run is finished in registers and written as the map lies. So nothing is turned round, which costs
// the product of conv_product.h as much as some sixteen terms of each sum. Bound: FLOPs; bytes
// where channels are few, for which large maps are streamed past the cache. Lanes past an image's
// last position are empty: conv_plan.h counts them.
#pragma once

#include "conv/conv_activation.h"
#include "conv/conv_gather.h"
#include "conv/conv_transpose.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

#if defined(__AVX512F__)
inline constexpr int kFlatVectors = 4;
#else
inline constexpr int kFlatVectors = 2;
#endif
// Terms that are added up in registers: a longer sum leaves more error.
inline constexpr int64_t kFlatTerms = 64;

// The positions of an image in panels of nearly equal width.
struct FlatPanels {
  int64_t positions, lanes, vectors, count;

  FlatPanels(int64_t image, int64_t of_vector)
      : positions(image),
        lanes(of_vector),
        vectors(ceil_div(image, of_vector)),
        count(ceil_div(vectors, kFlatVectors)) {}

  int64_t begin(int64_t panel) const { return vectors * panel / count * lanes; }
  int vectors_of(int64_t panel) const {
    return static_cast<int>(vectors * (panel + 1) / count - vectors * panel / count);
  }
  // Positions of a panel; its last lanes may be beyond them.
  int64_t width(int64_t panel) const {
    return least(positions, begin(panel) + vectors_of(panel) * lanes) - begin(panel);
  }
  static constexpr int64_t widest(int64_t lanes) { return kFlatVectors * lanes; }
};

template <int kVectors = kFlatVectors, class Acc, class Target>
void flat_batch(int vectors, const PackedBatch<Acc>& batch, int64_t rows, const Target& to) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return flat_batch<kVectors - 1>(vectors, batch, rows, to);
  }
  packed_batch<kVectors, false>(batch, rows, to);
}

// Sums, of which `held` [row, lane] has a part unless it is null, as rows of a contiguous map.
template <class T>
struct FinishFlat {
  using Acc = accumulate_t<T>;

  const ConvProblem& p;
  const Acc* bias;  // of each row; null: none
  const Acc* held;
  T* out;
  int64_t plane;
  int64_t width;  // positions
  bool streams;

  void skip(int64_t rows) {
    out += rows * plane;
    if (bias != nullptr) bias += rows;
    if (held != nullptr) held += rows * FlatPanels::widest(kLanes<T>);
  }

  template <int Rows, int Vectors>
  WEFT_INLINE void finish(const Vec<Acc> (&sum)[Rows][Vectors]) const {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Acc start = bias != nullptr ? bias[r] : Acc{0};
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Vec<Acc> value = sum[r][v] + start;
        if (held != nullptr)
          value += load_vec(held + r * FlatPanels::widest(kLanes<T>) + v * kLanes<T>);
        T* const to = out + r * plane + v * kLanes<T>;
        if (streams) {
          if (p.activation == Activation::relu) value = value <= 0 ? Vec<Acc>{} : value;
          stream_copy(to, &value, kVectorBytes);
        } else {
          store_lanes(to, value, width - v * kLanes<T>);
        }
      }
    }
    if (streams || p.activation == Activation::none) return;
    for (int r = 0; r < Rows; ++r) activate_row(p, out + r * plane, width);
  }
};

// Rows of weights [destination channel, source channel] of a group, as the product reads them.
template <class T>
class FlatWeights {
 public:
  using Acc = accumulate_t<T>;

  FlatWeights(const ConvProblem& p, const Gather& g, const T* weights, const Context& context)
      : turned_(g.transposed ? p.weight_elements() : 0),
        wide_(turn(p, g, weights, context), p.weight_elements(), context),
        rows_(p.groups * g.dst_channels) {
    for (int64_t i = 0; i < p.groups * g.dst_channels; ++i)
      rows_[i] = wide_.data() + i * g.src_channels;
  }
  const Acc* const* rows(int64_t channel) const { return rows_.data() + channel; }

 private:
  const T* turn(const ConvProblem& p, const Gather& g, const T* weights, const Context& context) {
    if (!g.transposed) return weights;
    transpose(weights, p.groups, p.k, p.c, turned_.data(), context);
    return turned_.data();
  }

  Scratch<T> turned_;
  Widened<T> wide_;
  Scratch<const Acc*> rows_;
};

// The product of a panel of source channels and rows of weights of a group.
template <class T>
class FlatProduct {
 public:
  using Acc = accumulate_t<T>;

  // For at most `most_rows` rows.
  FlatProduct(const Gather& g, int64_t most_rows)
      : terms_(g.src_channels),
        parts_(ceil_div(terms_, kFlatTerms)),
        held_(parts_ > 1 ? most_rows * kWidest : 0),
        ways_(parts_ > 1 ? most_rows : 0) {
    if (parts_ > 1)
      for (int64_t r = 0; r < most_rows; ++r) ways_[r] = held_.data() + r * kWidest;
  }

  // `panel` [source channel, lane] of `vectors`, `weights` of `rows`.
  void run(const Acc* panel, int vectors, const Acc* const* weights, int64_t rows,
           FinishFlat<T> to) {
    to.held = parts_ > 1 ? held_.data() : nullptr;
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t first = terms_ * part / parts_, last = terms_ * (part + 1) / parts_;
      const Acc* const from = panel + first * vectors * kLanes<T>;
      const PackedBatch<Acc> batch{weights, 0, &from, 1, first, last - first};
      if (part + 1 == parts_)
        flat_batch(vectors, batch, rows, to);
      else
        flat_batch(vectors, batch, rows, JoinSums<Acc>{part > 0, ways_.data()});
    }
  }

 private:
  static constexpr int64_t kWidest = FlatPanels::widest(kLanes<T>);

  int64_t terms_, parts_;
  Scratch<Acc> held_;
  Scratch<Acc*> ways_;
};

// `channels` of a map, `plane` apart, at the positions of a panel: [channel, lane], zeros beyond
// the last position. What the next panel reads is asked for.
template <class T>
void load_flat(const T* from, int64_t plane, int64_t channels, int64_t width, int vectors,
               accumulate_t<T>* to) {
  const int64_t row = vectors * kLanes<T>;
  for (int64_t c = 0; c < channels; ++c, from += plane, to += row)
    for (int64_t i = 0; i < row; i += kLanes<T>) {
      __builtin_prefetch(from + row + i);
      store_vec(to + i, load_lanes(from + i, width - i));
    }
}

// Whether vectors of a map's rows can be written past the cache.
template <class T>
bool flat_streams(const ConvProblem& p, const Gather& g, const T* dst) {
  return std::is_same_v<T, accumulate_t<T>> && g.dst_positions() % kLanes<T> == 0 &&
         reinterpret_cast<uintptr_t>(dst) % kVectorBytes == 0 &&
         (p.activation == Activation::none || p.activation == Activation::relu) &&
         conv_streams(p.n * p.groups * g.dst_channels * g.dst_positions() * size_of(p.dtype));
}

// Into how many blocks of rows the product of a panel is cut: where panels alone are too few tasks,
// whatever the number of threads, and blocks are worth one.
inline int64_t flat_row_blocks(const FlatPanels& panels, const Gather& g, int64_t images) {
  constexpr int64_t kTasks = 8, kLeastRows = 16, kLeastProducts = 128 * 1024;
  const int64_t tasks = most(images * panels.count, 1);
  const int64_t products = ceil_div(panels.positions, panels.count) * g.src_channels;
  return most(1, least(least(kTasks / tasks, g.dst_channels / kLeastRows),
                       products * g.dst_channels / kLeastProducts));
}

template <class T>
void gather_flat(const ConvProblem& p, const Gather& g, const T* src, const T* weights,
                 const T* bias, T* dst, const Context& context) {
  using Acc = accumulate_t<T>;
  const FlatWeights<T> rows(p, g, weights, context);
  const Widened<T> start(bias, bias != nullptr ? p.groups * g.dst_channels : 0, context);
  const FlatPanels panels(g.src_positions(), kLanes<T>);
  const int64_t plane = panels.positions;
  const bool streams = flat_streams(p, g, dst);
  const int64_t blocks = flat_row_blocks(panels, g, p.n * p.groups);
  parallel_for(context, p.n * p.groups * panels.count * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> panel(g.src_channels * FlatPanels::widest(kLanes<T>));
    FlatProduct<T> product(g, ceil_div(g.dst_channels, blocks));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t of_all = task / blocks, block = task % blocks;
      const int64_t at = of_all % panels.count, map = of_all / panels.count;
      const int64_t first = panels.begin(at), width = panels.width(at);
      const int vectors = panels.vectors_of(at);
      if (task == begin || block == 0)
        load_flat(src + map * g.src_channels * plane + first, plane, g.src_channels, width, vectors,
                  panel.data());
      const int64_t row = g.dst_channels * block / blocks;
      const int64_t channel = map % p.groups * g.dst_channels + row;
      product.run(panel.data(), vectors, rows.rows(channel),
                  g.dst_channels * (block + 1) / blocks - row,
                  {p, bias != nullptr ? start.data() + channel : nullptr, nullptr,
                   dst + (map * g.dst_channels + row) * plane + first, plane, width, streams});
    }
    if (streams) stream_fence();
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
