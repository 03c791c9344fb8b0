// The weight gradient of a depthwise convolution on CUDA, and of few channels a group.
//
// A block owns a chunk of groups and a run of tiles: for each it copies the box of the input and
// the tile of gradients to shared memory, and adds up x · gy for every (place, channel), in
// channels-last maps for 8 bytes of channels together. Where those are fewer than the threads,
// several threads share each, a row of the tile in turn, and meet in shared memory, in order. The
// maps are so read once; where the tiles are split among blocks, a second launch adds their sums in
// order. Bound: bytes for small windows, loads from shared memory for large ones.
#include "conv/conv_cuda.h"
#include "conv/conv_depthwise_tile.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = depthwise_plan::kThreads;

// The outputs of a tile, relative to it, that read inside the map at one place of an axis, and the
// source of output 0 of the tile, relative to the box.
struct PlaceRange {
  int begin, end, source;
};

WEFT_DEVICE PlaceRange place_range(const GatherAxis& axis, int place, int first, int extent,
                                   const Hull& box) {
  const Window& w = axis.window;
  const int64_t at = w.first_input(first) + place * w.dilation;  // what output `first` reads
  const int64_t begin = at >= 0 ? 0 : ceil_div(-at, w.stride);
  const int64_t last = axis.source - at;
  const int64_t end = last <= 0 ? 0 : ceil_div(last, w.stride);
  return {static_cast<int>(begin), static_cast<int>(end < extent ? end : extent),
          static_cast<int>(at - box.begin)};
}

// x · gy of kPack neighbouring channels, from `source` and `target` on, and one place over rows
// lane, lane + lanes, ... of the tile. Rows are added in runs, which keeps chains of sums short.
template <int kPack, class T>
WEFT_DEVICE device::Pack<accumulate_t<T>, kPack> tile_sums(const DepthwiseWalk& walk,
                                                           const DepthwiseBlock& b, const T* box,
                                                           const T* tile, int source, int target,
                                                           int place, int lane, int lanes) {
  using Values = device::Pack<T, kPack>;
  constexpr int kRun = 8;
  device::Pack<accumulate_t<T>, kPack> sums{}, run{};
  const int in_plane = place % walk.place_step[0];
  const int at[3] = {place / walk.place_step[0], in_plane / walk.place_step[1],
                     in_plane % walk.place_step[1]};
  PlaceRange range[3];
  for (int a = 0; a < 3; ++a) {
    range[a] = place_range(walk.axis[a], at[a], b.first[a], b.extent[a], b.box[a]);
    if (range[a].begin >= range[a].end) return sums;
  }
  const int heights = range[1].end - range[1].begin;
  const int depths = range[0].end - range[0].begin;
  const auto stride = [&](int a) { return static_cast<int>(walk.axis[a].window.stride); };
  const int value_step = stride(2) * walk.box.w;
  int rows = 0;
  for (int row = lane; row < b.images * depths * heights; row += lanes) {
    const int h = range[1].begin + row % heights;
    const int d = range[0].begin + row / heights % depths;
    const int image = row / heights / depths;
    const T* value = box + image * walk.box.image + source * walk.box.channel +
                     (range[0].source + d * stride(0)) * walk.box.d +
                     (range[1].source + h * stride(1)) * walk.box.h +
                     (range[2].source + range[2].begin * stride(2)) * walk.box.w;
    const T* gradient = tile + image * walk.out.image + target * walk.out.channel + d * walk.out.d +
                        h * walk.out.h + range[2].begin * walk.out.w;
    device::Pack<accumulate_t<T>, kPack> part{};
    for (int w = range[2].begin; w < range[2].end; ++w) {
      const auto& x = *reinterpret_cast<const Values*>(value);
      const auto& gy = *reinterpret_cast<const Values*>(gradient);
      WEFT_UNROLL
      for (int c = 0; c < kPack; ++c) part[c] += widen(x[c]) * widen(gy[c]);
      value += value_step;
      gradient += walk.out.w;
    }
    const bool last = ++rows % kRun == 0;
    WEFT_UNROLL
    for (int c = 0; c < kPack; ++c) {
      run[c] += part[c];
      sums[c] += last ? run[c] : 0;
      run[c] = last ? 0 : run[c];
    }
  }
  WEFT_UNROLL
  for (int c = 0; c < kPack; ++c) sums[c] += run[c];
  return sums;
}

// Without splits the sums are the gradient; else they are one of `partial` [splits, weights]. Sums
// of grouped problems lie as the weights do; of depthwise ones by place and channel where those are
// neighbours in memory.
template <class T, int kPack, bool kGrouped>
WEFT_GLOBAL WEFT_HOT void conv_depthwise_wgrad(DepthwiseWalk walk, int64_t tiles, int splits,
                                               const T* x, const T* gy, accumulate_t<T>* partial,
                                               T* gw) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  T* box = shared.take<T>(walk.box.elements);
  T* tile = shared.take<T>(walk.out.elements);
  const int each = walk.source_each * walk.target_each * walk.places;  // weights of a group
  const int all = walk.tile_groups * each;
  Acc* sums = shared.take<Acc>(all > kThreads * kPack ? all : kThreads * kPack);
  const auto index = static_cast<unsigned>(device::block_index());
  const unsigned chunk = index % walk.chunks;
  const int split = static_cast<int>(index / walk.chunks);
  const int64_t share = (tiles + splits - 1) / splits;
  const int64_t end = (split + 1) * share < tiles ? (split + 1) * share : tiles;
  const int thread = device::thread_index();
  const int packs = all / kPack;
  const int lanes = packs < kThreads ? kThreads / packs : 1;  // threads that share a pack of sums
  for (int i = thread; i < lanes * all; i += kThreads) sums[i] = 0;

  int groups = 0;
  for (int64_t at = split * share; at < end; ++at) {
    const DepthwiseBlock b = depthwise_block(walk, chunk, static_cast<unsigned>(at));
    groups = b.groups;
    const int begin[3] = {b.box[0].begin, b.box[1].begin, b.box[2].begin};
    const int size[3] = {b.box[0].size, b.box[1].size, b.box[2].size};
    copy_box(walk, b, x, walk.source, walk.source_each, begin, size, walk.box, walk.copy, box);
    copy_box(walk, b, gy, walk.target, walk.target_each, b.first, b.extent, walk.out, walk.copy_out,
             tile);
    device::cp_async_commit();
    device::cp_async_wait<0>();
    device::barrier();
    for (int i = thread; i < lanes * packs; i += kThreads) {
      const int at_pack = i % packs * kPack;
      BlockWeight weight;
      if constexpr (kGrouped)
        weight = block_weight(walk, at_pack);
      else if (walk.channels_last)
        weight = {at_pack % walk.tile_groups, 0, at_pack / walk.tile_groups};
      else
        weight = {at_pack / walk.places, 0, at_pack % walk.places};
      if (weight.target >= groups * walk.target_each) continue;
      const int source = kGrouped
                             ? weight.target / walk.target_each * walk.source_each + weight.source
                             : weight.target;
      const auto more = tile_sums<kPack>(walk, b, box, tile, source, weight.target, weight.place,
                                         i / packs, lanes);
      Acc* to = sums + i / packs * all + at_pack;
      for (int c = 0; c < kPack; ++c) to[c] += more[c];
    }
    device::barrier();
  }

  const int64_t first = int64_t{1} * chunk * all;
  for (int i = thread; i < groups * each; i += kThreads) {
    const int sum =
        !kGrouped && walk.channels_last ? i % walk.places * walk.tile_groups + i / walk.places : i;
    Acc total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += sums[lane * all + sum];
    if (splits == 1)
      store(gw + first + i, narrow<T>(total));
    else
      store(partial + int64_t{1} * split * walk.groups * each + first + i, total);
  }
}

}  // namespace

void launch_depthwise_wgrad(const ConvProblem& p, const DepthwisePlan& plan, const void* x,
                            const void* gy, void* gw, const Context& context) {
  const DepthwiseWalk walk = depthwise_walk(p, plan, false, x, gy);
  const bool split = plan.splits > 1;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    constexpr int kPack = 8 / sizeof(T);
    const bool grouped = p.c * p.k > 1;
    const bool packs =
        !grouped && p.channels_last && p.groups % kPack == 0 && plan.groups % kPack == 0;
    const auto kernel = grouped ? conv_depthwise_wgrad<T, 1, true>
                        : packs ? conv_depthwise_wgrad<T, kPack, false>
                                : conv_depthwise_wgrad<T, 1, false>;
    device::launch({grouped ? "conv_grouped_wgrad" : "conv_depthwise_wgrad",
                    plan.chunks * plan.splits, kThreads, plan.bytes, context.stream},
                   kernel, walk, plan.tiles, plan.splits, static_cast<const T*>(x),
                   static_cast<const T*>(gy),
                   split ? static_cast<Acc*>(context.workspace) : nullptr,
                   split ? nullptr : static_cast<T*>(gw));
  });
  if (split) launch_wgrad_sum(p, plan.splits, context.workspace, gw, context);
}

}  // namespace weft::WEFT_TARGET
