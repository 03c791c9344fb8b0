// Depthwise convolution on CUDA, and of few channels a group, fprop and dgrad: one gather.
//
// A block copies the box of sources that its tile of targets reads to shared memory, once, with the
// weights of its channels (as accumulator numbers); then a thread makes one target at a time, in
// channels-last maps a pack of 8 bytes of them, which costs as many loads from shared memory;
// neighbours along the contiguous index. With more channels a group a target takes all sources of
// its group in turn, and not in packs. What a position reads on each axis (clipped at the edges,
// strided, dilated, inverse) is tabled once a tile, so the sum is three loops without conditions,
// and dgrad differs from fprop in its tables alone: no zeros are multiplied, whatever the stride.
// Bound: bytes for small windows, loads from shared memory for large ones.
#include "conv/conv_cuda.h"
#include "conv/conv_depthwise_tile.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = depthwise_plan::kThreads;

struct Epilogue {
  Activation activation = Activation::none;
  double slope = 0;
};

// The reaches of a tile along each axis, relative to its box.
struct ReachTables {
  Reach* axis[3];
};

WEFT_DEVICE ReachTables make_tables(const DepthwiseWalk& walk, const DepthwiseBlock& b,
                                    device::SharedMemory& shared) {
  ReachTables tables;
  auto* all = shared.take<Reach>(walk.extent[0] + walk.extent[1] + walk.extent[2]);
  for (int a = 0; a < 3; ++a) {
    tables.axis[a] = all;
    all += walk.extent[a];
    for (int i = device::thread_index(); i < b.extent[a]; i += kThreads) {
      Reach reach = reach_of(walk.axis[a], b.first[a] + i);
      reach.source -= b.box[a].begin;
      tables.axis[a][i] = reach;
    }
  }
  return tables;
}

// Element `item` of a tile, in the order of memory; channels by packs of kPack.
struct TileItem {
  int image, channel, at[3];
};

template <int kPack>
WEFT_DEVICE TileItem tile_item(const DepthwiseWalk& walk, int item) {
  TileItem e;
  const auto take_channel = [&] {
    int rest = item;
    item = walk.by_channels.split(rest);
    e.channel = rest * kPack;
  };
  if (walk.channels_last) take_channel();
  for (int a = 2; a >= 0; --a) {
    int rest = item;
    item = walk.by_extent[a].split(rest);
    e.at[a] = rest;
  }
  if (!walk.channels_last) take_channel();
  e.image = item;
  return e;
}

// Weights as they lie in shared memory: the target's channel last where neighbouring threads are
// channels, else first.
template <class Acc>
struct StagedWeights {
  Acc* at;
  int source_step, place_step, channel_step;
};

// The sums of kPack neighbouring channels, a row of the window at a time. Grouped: of one channel,
// over all sources of its group.
template <int kPack, bool kGrouped, class T, class Acc>
WEFT_DEVICE device::Pack<Acc, kPack> gather(const DepthwiseWalk& walk, const ReachTables& tables,
                                            const StagedWeights<Acc>& weights, const T* box,
                                            const TileItem& e) {
  using Values = device::Pack<T, kPack>;
  using Sums = device::Pack<Acc, kPack>;
  const Reach d = tables.axis[0][e.at[0]];
  const Reach h = tables.axis[1][e.at[1]];
  const Reach r = tables.axis[2][e.at[2]];
  const int channel = kGrouped ? e.channel / walk.target_each * walk.source_each : e.channel;
  const T* values = box + e.image * walk.box.image + channel * walk.box.channel +
                    d.source * walk.box.d + h.source * walk.box.h + r.source * walk.box.w;
  const Acc* factors =
      weights.at + e.channel * weights.channel_step +
      (d.place * walk.place_step[0] + h.place * walk.place_step[1] + r.place) * weights.place_step;
  const int value_step = walk.axis[2].source_step * walk.box.w;
  const int factor_step = walk.axis[2].place_step * weights.place_step;
  Sums sums{};
  for (int source = 0; source < (kGrouped ? walk.source_each : 1); ++source) {
    for (int i = 0; i < d.count; ++i)
      for (int j = 0; j < h.count; ++j) {
        const T* value = values + i * walk.axis[0].source_step * walk.box.d +
                         j * walk.axis[1].source_step * walk.box.h;
        const Acc* factor = factors + (i * walk.axis[0].place_step * walk.place_step[0] +
                                       j * walk.axis[1].place_step * walk.place_step[1]) *
                                          weights.place_step;
        Sums row{};
        for (int l = 0; l < r.count; ++l, value += value_step, factor += factor_step) {
          const auto& x = *reinterpret_cast<const Values*>(value);
          const auto& w = *reinterpret_cast<const Sums*>(factor);
          WEFT_UNROLL
          for (int c = 0; c < kPack; ++c) row[c] += widen(x[c]) * w[c];
        }
        WEFT_UNROLL
        for (int c = 0; c < kPack; ++c) sums[c] += row[c];
      }
    values += walk.box.channel;
    factors += weights.source_step;
  }
  return sums;
}

template <class T, int kPack, bool kGrouped>
WEFT_GLOBAL WEFT_HOT void conv_depthwise(DepthwiseWalk walk, Epilogue epilogue, const T* source,
                                         const T* w, const T* bias, T* target) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  T* box = shared.take<T>(walk.box.elements);
  const int each = walk.source_each * walk.places;  // weights of a target
  const int targets = walk.tile_groups * walk.target_each;
  StagedWeights<Acc> weights{shared.take<Acc>(targets * each),
                             walk.channels_last ? walk.places * targets : walk.places,
                             walk.channels_last ? targets : 1, walk.channels_last ? 1 : each};
  const auto index = static_cast<unsigned>(device::block_index());
  const DepthwiseBlock b = depthwise_block(walk, index % walk.chunks, index / walk.chunks);
  const int begin[3] = {b.box[0].begin, b.box[1].begin, b.box[2].begin};
  const int size[3] = {b.box[0].size, b.box[1].size, b.box[2].size};
  copy_box(walk, b, source, walk.source, walk.source_each, begin, size, walk.box, walk.copy, box);
  device::cp_async_commit();
  const ReachTables tables = make_tables(walk, b, shared);
  const T* from = w + int64_t{1} * b.group * walk.target_each * each;
  for (int i = device::thread_index(); i < b.groups * walk.target_each * each; i += kThreads) {
    const BlockWeight at = block_weight(walk, i);
    weights.at[at.target * weights.channel_step + at.source * weights.source_step +
               at.place * weights.place_step] = widen(load(from + i));
  }
  device::cp_async_wait<0>();
  device::barrier();

  const int items = b.images * targets / kPack * walk.extent[0] * walk.extent[1] * walk.extent[2];
  for (int item = device::thread_index(); item < items; item += kThreads) {
    const TileItem e = tile_item<kPack>(walk, item);
    if (e.channel >= b.groups * walk.target_each || e.at[0] >= b.extent[0] ||
        e.at[1] >= b.extent[1] || e.at[2] >= b.extent[2])
      continue;
    const auto sums = gather<kPack, kGrouped>(walk, tables, weights, box, e);
    const int channel = b.group * walk.target_each + e.channel;
    device::Pack<T, kPack> results;
    for (int c = 0; c < kPack; ++c) {
      const Acc sum = bias == nullptr ? sums[c] : sums[c] + widen(load(bias + channel + c));
      results[c] = narrow<T>(sum);
      if (epilogue.activation != Activation::none)
        results[c] = narrow<T>(activated(epilogue.activation, epilogue.slope, widen(results[c])));
    }
    T* to = target + (b.image + e.image) * walk.target.image + channel * walk.target.channel +
            (b.first[0] + e.at[0]) * walk.target.axis[0] +
            (b.first[1] + e.at[1]) * walk.target.axis[1] +
            (b.first[2] + e.at[2]) * walk.target.axis[2];
    store(to, results);
  }
}

}  // namespace

void launch_depthwise_gather(const ConvProblem& p, const DepthwisePlan& plan, bool inverse,
                             const void* source, const void* w, const void* bias, void* target,
                             const Context& context) {
  DepthwiseWalk walk = depthwise_walk(p, plan, inverse, source, target);
  const Epilogue epilogue = inverse ? Epilogue{} : Epilogue{p.activation, p.slope};
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kPack = 8 / sizeof(T);
    const bool grouped = p.c * p.k > 1;
    const bool packs = !grouped && p.channels_last && p.groups % kPack == 0 &&
                       plan.groups % kPack == 0 && begins_pack(target);
    if (packs) walk.by_channels = WideDivider(plan.groups / kPack);
    const char* name = grouped ? (inverse ? "conv_grouped_dgrad" : "conv_grouped_fprop")
                               : (inverse ? "conv_depthwise_dgrad" : "conv_depthwise_fprop");
    const auto kernel = grouped ? conv_depthwise<T, 1, true>
                        : packs ? conv_depthwise<T, kPack, false>
                                : conv_depthwise<T, 1, false>;
    device::launch({name, plan.tiles * plan.chunks, kThreads, plan.bytes, context.stream}, kernel,
                   walk, epilogue, static_cast<const T*>(source), static_cast<const T*>(w),
                   static_cast<const T*>(bias), static_cast<T*>(target));
  });
}

}  // namespace weft::WEFT_TARGET
