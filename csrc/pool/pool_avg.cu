// Average pooling on CUDA, both directions.
//
// Forward and backward are one gather: the sum over a box of sources, divided. A block copies its
// box to shared memory (pool_tile.h) and sums it in two passes, along W and then along D and H, so
// that an element costs size_W + size_D * size_H additions, not their product, whatever the window.
// What a position reads on each axis (fixed, adaptive, inverse, clipped) is tabled once a tile, so
// the passes are loops from begin to end. Long windows that hardly overlap (global pooling) are
// reduced by a block each, in a tree of fixed order; windows with gaps between them are walked by
// one thread each. Bound: bytes.
//
// Backward divides what it reads where divisors differ, else the sum, once.
#include "pool/pool_cuda.h"
#include "pool/pool_long_windows.h"
#include "pool/pool_passes.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

// A sum of any number of values that loses few bits: eights of them are added up in double, which
// costs a fraction of the arithmetic of a memory-bound kernel.
template <class Acc>
class LongSum {
 public:
  WEFT_DEVICE void add(Acc value) {
    eight_ += value;
    if (++count_ % 8 != 0) return;
    rest_ += eight_;
    eight_ = 0;
  }
  WEFT_DEVICE Acc total() const { return count_ < 8 ? eight_ : static_cast<Acc>(rest_ + eight_); }

 private:
  Acc eight_ = 0;
  double rest_ = 0;
  unsigned count_ = 0;
};

// The counts of the box's outputs on each axis, whose product divides a gradient.
struct CountTables {
  int* axis[3];
};

template <class T>
struct AvgTile {
  using Acc = accumulate_t<T>;
  static constexpr int kPackElements = 16 / sizeof(T);
  const TileWalk& walk;
  const TileBlock& block;
  const BoxLayout& layout;
  device::SharedMemory& shared;
  const T* source;
  T* target;
  T* piece = shared.take<T>(layout.elements);
  Acc* middle = shared.take<Acc>(middle_elements(walk));
  // Of the sources: backward through windows that differ.
  const bool by_counts = walk.inverse && walk.divisor == 0;
  const T* box = nullptr;
  ReachTables reaches = {};
  CountTables counts = {};

  WEFT_DEVICE void load(const TileBlock& chunk) {
    box = load_box(walk, chunk, layout, source, piece);
  }
  WEFT_DEVICE void make_tables() {
    reaches = reach_tables(walk, block, shared);
    if (!by_counts) return;
    for (int a = 0; a < 3; ++a) {
      counts.axis[a] = shared.take<int>(walk.box[a]);
      for (int i = device::thread_index(); i < block.box[a].size; i += device::block_size())
        counts.axis[a][i] = forward_reach(walk.axis[a], block.box[a].begin + i).count;
    }
  }
  WEFT_DEVICE void make_rows(const TileBlock& chunk, int row) const {
    if (walk.pass_pack > 1)
      sum_rows<kPackElements>(chunk, row);
    else
      sum_rows<1>(chunk, row);
  }
  WEFT_DEVICE void make_tile(const TileBlock& strip, int first) const {
    if (walk.target_w * walk.target_c > 1)
      sum_planes<kPackElements>(strip, first);
    else
      sum_planes<1>(strip, first);
  }

  // Sums along W of kPack neighbouring channels: the rows of a chunk's box, of which the first is
  // row `row` of the block's, to the middle.
  template <int kPack>
  WEFT_DEVICE void sum_rows(const TileBlock& chunk, int row) const {
    const int items = row_items(walk, chunk);
    const int ring = row % walk.kept_rows;
    const int* row_counts = counts.axis[1] + (chunk.box[1].begin - block.box[1].begin);
    const int step = walk.tile[4];
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      RowElement e;
      if (!row_element(walk, chunk, item, e)) continue;
      const Reach reach = reaches.axis[2][e.w];
      LongSum<Acc> sum[kPack];
      const T* from =
          box + e.plane * layout.plane_pitch + e.row * layout.row_pitch + reach.begin * step + e.c;
      const int count =
          by_counts ? counts.axis[0][e.plane % block.box[0].size] * row_counts[e.row] : 1;
      for (int w = reach.begin; w < reach.end; ++w, from += step) {
        T values[kPack];
        load_values(from, values);
        for (int i = 0; i < kPack; ++i) {
          const Acc value = widen(values[i]);
          sum[i].add(by_counts ? value / static_cast<Acc>(count * counts.axis[2][w]) : value);
        }
      }
      Acc totals[kPack];
      for (int i = 0; i < kPack; ++i) totals[i] = sum[i].total();
      const int kept = ring_row(walk, ring, e.row);
      keep_values(middle + middle_index(walk, e.plane, kept, e.w, e.c), totals);
    }
  }

  // Sums of those along D and H, divided, of kPack neighbours in W (contiguous) or C: a strip of
  // the tile, from its row `first` on.
  template <int kPack>
  WEFT_DEVICE void sum_planes(const TileBlock& strip, int first) const {
    T* tile = target + tile_start(walk, strip);
    const int items = tile_items(walk, strip);
    const int row_step = walk.tile[3] * walk.tile[4];
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      TileElement e;
      if (!tile_element(walk, strip, item, e)) continue;
      const Reach d = reaches.axis[0][e.d];
      const Reach h = reaches.axis[1][first + e.h];
      LongSum<Acc> sum[kPack];
      const int ring = h.begin % walk.kept_rows;
      for (int plane = d.begin; plane < d.end; ++plane) {
        const Acc* from =
            middle + middle_index(walk, e.outer * block.box[0].size + plane, 0, e.w, e.c);
        int row = ring;
        for (int i = h.begin; i < h.end; ++i, row = ring_row(walk, row, 1)) {
          Acc values[kPack];
          load_values(from + row * row_step, values);
          for (int n = 0; n < kPack; ++n) sum[n].add(values[n]);
        }
      }
      T results[kPack];
      for (int i = 0; i < kPack; ++i) {
        Acc divisor = 1;
        if (walk.divisor != 0) {
          divisor = static_cast<Acc>(walk.divisor);
        } else if (!walk.inverse) {
          const int w = walk.target_w > 1 ? e.w + i : e.w;
          divisor =
              static_cast<Acc>(static_cast<int64_t>(d.count) * h.count * reaches.axis[2][w].count);
        }
        results[i] = narrow<T>(sum[i].total() / divisor);
      }
      store_values(tile + target_offset(walk, e), results);
    }
  }
};

template <class T>
WEFT_GLOBAL WEFT_HOT void avg_pool_tile(TileWalk walk, BoxLayout layout, const T* source,
                                        T* target) {
  device::SharedMemory shared;
  const TileBlock block = block_of(walk);
  AvgTile<T> work{walk, block, layout, shared, source, target};
  for_strips(walk, block, work);
}

// ---- long windows -------------------------------------------------------------------------------

// Contiguous maps: a block an output.
template <class T>
WEFT_GLOBAL WEFT_HOT void avg_pool_reduce_rows(PoolProblem p, const T* x, T* y) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* partial = shared.take<Acc>(kReduceWarps);
  const int64_t index = device::block_index();
  const WindowRows rows = window_rows(p, index);
  LongSum<Acc> lane_sum;
  for_window_rows(rows, x, [&](Acc value, int64_t) { lane_sum.add(value); });
  Acc sum = lane_sum.total();
  for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  if (device::lane() == 0) partial[device::thread_index() / 32] = sum;
  device::barrier();
  if (device::thread_index() != 0) return;
  Acc total = 0;
  for (int i = 0; i < kReduceWarps; ++i) total += partial[i];
  const device::Element e = device::split(index, p.out, 1);
  store(y + index, narrow<T>(total / static_cast<Acc>(pool_divisor(p, e.d, e.h, e.w))));
}

// Channels-last maps: a block a run of channels of an output; kPack channels a thread.
template <class T, int kPack>
WEFT_GLOBAL WEFT_HOT void avg_pool_reduce_channels(PoolProblem p, int run, const T* x, T* y) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* partial = shared.take<Acc>(kReduceThreads * kPack);
  const ChannelRun r = channel_run<kPack>(p, run);
  LongSum<Acc> sum[kPack];
  for_window_positions(p, r, [&](int64_t offset, int64_t) {
    T values[kPack];
    read_values(x + offset, values);
    for (int i = 0; i < kPack; ++i) sum[i].add(widen(values[i]));
  });
  Acc* mine = partial + device::thread_index() * kPack;
  for (int i = 0; i < kPack; ++i) mine[i] = sum[i].total();
  for (int groups = r.groups; groups > 1;) {
    const int half = (groups + 1) / 2;
    device::barrier();
    if (r.group + half < groups && r.group < half)
      for (int i = 0; i < kPack; ++i) mine[i] += mine[half * r.lanes * kPack + i];
    groups = half;
  }
  if (r.group != 0 || !r.works) return;
  const Acc divisor = static_cast<Acc>(pool_divisor(p, r.at.d, r.at.h, r.at.w));
  T results[kPack];
  for (int i = 0; i < kPack; ++i) results[i] = narrow<T>(mine[i] / divisor);
  store_values(y + r.target, results);
}

// ---- windows with gaps, or too large for shared memory ------------------------------------------

template <class T>
WEFT_GLOBAL void avg_pool_walk(PoolProblem p, const T* x, T* y) {
  const int64_t index = device::global_thread();
  if (index >= p.out_elements()) return;
  const device::Element e = device::split(index, p.out, p.inner);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  using Acc = accumulate_t<T>;
  LongSum<Acc> sum;
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j)
      for (int64_t k = kw.begin; k < kw.end; ++k) {
        const int64_t d = p.window[0].first_input(e.d) + i;
        const int64_t h = p.window[1].first_input(e.h) + j;
        const int64_t w = p.window[2].first_input(e.w) + k;
        sum.add(widen(load(x + flat_index(e, d, h, w, p.in, p.inner))));
      }
  store(y + index, narrow<T>(sum.total() / static_cast<Acc>(pool_divisor(p, e.d, e.h, e.w))));
}

template <class T>
WEFT_GLOBAL void avg_pool_backward_walk(PoolProblem p, const T* gy, T* gx) {
  const int64_t index = device::global_thread();
  if (index >= p.in_elements()) return;
  const device::Element e = device::split(index, p.in, p.inner);
  const Range od = outputs_covering(p.window[0], e.d, p.out[0]);
  const Range oh = outputs_covering(p.window[1], e.h, p.out[1]);
  const Range ow = outputs_covering(p.window[2], e.w, p.out[2]);
  using Acc = accumulate_t<T>;
  Acc sum = 0;
  for (int64_t d = od.begin; d < od.end; ++d)
    for (int64_t h = oh.begin; h < oh.end; ++h)
      for (int64_t w = ow.begin; w < ow.end; ++w)
        sum += widen(load(gy + flat_index(e, d, h, w, p.out, p.inner))) /
               static_cast<Acc>(pool_divisor(p, d, h, w));
  store(gx + index, narrow<T>(sum));
}

template <class T>
void launch_tile(const PoolProblem& p, PoolStep step, const PoolPlan& plan, const T* source,
                 T* target, const Context& context) {
  const TileWalk walk = walk_of(p, step, plan, source, target);
  device::launch(launch_of("avg_pool_tile", plan, context), avg_pool_tile<T>, walk,
                 box_layout(plan, walk, sizeof(T), source), source, target);
}

}  // namespace

void launch_avg_forward(const PoolProblem& p, const void* x, void* y, const Context& context) {
  const PoolPlan plan = plan_here(p, PoolStep::avg_forward);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    if (plan.path == PoolPlan::Path::tile)
      return launch_tile(p, PoolStep::avg_forward, plan, from, to, context);
    if (plan.path == PoolPlan::Path::walk)
      return device::launch(launch_of("avg_pool_walk", plan, context), avg_pool_walk<T>, p, from,
                            to);
    if (p.inner == 1)
      return device::launch(launch_of("avg_pool_reduce_rows", plan, context),
                            avg_pool_reduce_rows<T>, p, from, to);
    const auto run = static_cast<int>(plan.tile.c);
    const auto config = launch_of("avg_pool_reduce_channels", plan, context);
    constexpr int kPack = 16 / sizeof(T);
    if (has_channel_packs(p, kPack, x))
      device::launch(config, avg_pool_reduce_channels<T, kPack>, p, run, from, to);
    else
      device::launch(config, avg_pool_reduce_channels<T, 1>, p, run, from, to);
  });
}

void launch_avg_backward(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  const PoolPlan plan = plan_here(p, PoolStep::avg_backward);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* from = static_cast<const T*>(gy);
    auto* to = static_cast<T*>(gx);
    if (plan.path == PoolPlan::Path::tile)
      launch_tile(p, PoolStep::avg_backward, plan, from, to, context);
    else
      device::launch(launch_of("avg_pool_backward_walk", plan, context), avg_pool_backward_walk<T>,
                     p, from, to);
  });
}

}  // namespace weft::WEFT_TARGET
