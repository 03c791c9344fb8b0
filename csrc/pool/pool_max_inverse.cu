// What follows from the places of max pooling on CUDA: gradients, picked values, flat indices.
//
// Backward: a block copies the gradients and the places of all windows that can hold its tile of
// inputs to shared memory; a thread gathers, for its inputs, from the windows whose place is that
// input, in ascending order. Nothing is atomic, so the bits never change. Bound: bytes. Where many
// windows hold an input, gradients are added by columns instead (pool_max_columns.cu).
#include "pool/pool_cuda.h"
#include "pool/pool_passes.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

// On each axis, the first input of each window in the box, relative to nothing: a map's position.
struct FirstTables {
  int* axis[3];
};

template <class T, class Place>
struct MaxGather {
  using Acc = accumulate_t<T>;
  const TileWalk& walk;
  const TileBlock& block;
  const BoxLayout& layout;
  const BoxLayout& place_layout;
  device::SharedMemory& shared;
  const T* gy;
  const Place* map_places;
  T* gx;
  T* piece = shared.take<T>(layout.elements);
  Place* place_piece = shared.take<Place>(place_layout.elements);
  T* gradients = nullptr;
  Place* places = nullptr;
  ReachTables reaches = {};
  FirstTables firsts = {};

  WEFT_DEVICE void load() {
    gradients = load_box(walk, block, layout, gy, piece);
    places = load_box(walk, block, place_layout, map_places, place_piece);
  }
  WEFT_DEVICE void make_tables() {
    reaches = reach_tables(walk, block, shared);
    for (int a = 0; a < 3; ++a) {
      firsts.axis[a] = shared.take<int>(walk.box[a]);
      for (int i = device::thread_index(); i < block.box[a].size; i += device::block_size())
        firsts.axis[a][i] = walk.axis[a].first_input(block.box[a].begin + i);
    }
  }
  // The place on one axis at which the window that begins at `first` reads `input`, or -1.
  WEFT_DEVICE int place_on(int a, int input, int first) const {
    const int dilation = walk.axis[a].dilation;
    const int offset = input - first;
    if (dilation == 1) return offset;
    return offset % dilation == 0 ? offset / dilation : -1;
  }

  // Gradients of kPack neighbouring channels.
  template <int kPack>
  WEFT_DEVICE void gather() const {
    T* tile = gx + tile_start(walk, block);
    const int items = tile_items(walk, block);
    const int size_h = walk.axis[1].size;
    const int size_w = walk.axis[2].size;
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      TileElement e;
      if (!tile_element(walk, block, item, e)) continue;
      const Reach rd = reaches.axis[0][e.d];
      const Reach rh = reaches.axis[1][e.h];
      const Reach rw = reaches.axis[2][e.w];
      Acc sum[kPack] = {};
      for (int d = rd.begin; d < rd.end; ++d) {
        const int i = place_on(0, block.at[0] + e.d, firsts.axis[0][d]);
        const int plane = e.outer * block.box[0].size + d;
        for (int h = rh.begin; h < rh.end; ++h) {
          const int j = place_on(1, block.at[1] + e.h, firsts.axis[1][h]);
          if (i < 0 || j < 0) continue;
          const int row_place = (i * size_h + j) * size_w;
          const T* gradient_row =
              gradients + plane * layout.plane_pitch + h * layout.row_pitch + e.c;
          const Place* place_row =
              places + plane * place_layout.plane_pitch + h * place_layout.row_pitch + e.c;
          for (int w = rw.begin; w < rw.end; ++w) {
            const int k = place_on(2, block.at[2] + e.w, firsts.axis[2][w]);
            const auto mine = static_cast<Place>(row_place + k);
            Place kept[kPack];
            load_values(place_row + w * walk.tile[4], kept);
            T values[kPack];
            load_values(gradient_row + w * walk.tile[4], values);
            for (int n = 0; n < kPack; ++n)
              if (k >= 0 && kept[n] == mine) sum[n] += widen(values[n]);
          }
        }
      }
      T results[kPack];
      for (int n = 0; n < kPack; ++n) results[n] = narrow<T>(sum[n]);
      store_values(tile + target_offset(walk, e), results);
    }
  }
};

template <class T, class Place>
WEFT_GLOBAL WEFT_HOT void max_pool_backward_tile(TileWalk walk, BoxLayout layout,
                                                 BoxLayout place_layout, const T* gy,
                                                 const Place* places, T* gx) {
  device::SharedMemory shared;
  const TileBlock block = block_of(walk);
  MaxGather<T, Place> work{walk, block, layout, place_layout, shared, gy, places, gx};
  work.load();
  work.make_tables();
  device::cp_async_wait<0>();
  device::barrier();
  if (walk.target_c > 1)
    work.template gather<16 / sizeof(T)>();
  else
    work.template gather<1>();
}

// ---- windows with gaps, or too large for shared memory ------------------------------------------

template <class T, class Place>
WEFT_GLOBAL void max_pool_backward_walk(PoolProblem p, const T* gy, const Place* places, T* gx) {
  const int64_t index = device::global_thread();
  if (index >= p.in_elements()) return;
  const device::Element e = device::split(index, p.in, p.inner);
  const Range od = outputs_covering(p.window[0], e.d, p.out[0]);
  const Range oh = outputs_covering(p.window[1], e.h, p.out[1]);
  const Range ow = outputs_covering(p.window[2], e.w, p.out[2]);
  accumulate_t<T> sum = 0;
  for (int64_t d = od.begin; d < od.end; ++d)
    for (int64_t h = oh.begin; h < oh.end; ++h)
      for (int64_t w = ow.begin; w < ow.end; ++w) {
        const int64_t i = place_of(p.window[0], e.d, d);
        const int64_t j = place_of(p.window[1], e.h, h);
        const int64_t k = place_of(p.window[2], e.w, w);
        if (i < 0 || j < 0 || k < 0) continue;
        const int64_t output = flat_index(e, d, h, w, p.out, p.inner);
        const int64_t mine = (i * p.window[1].size + j) * p.window[2].size + k;
        if (load(places + output) == mine) sum += widen(load(gy + output));
      }
  store(gx + index, narrow<T>(sum));
}

// ---- values and indices at the places -----------------------------------------------------------

// Where the window of output `e` has its maximum, as (d, h, w) of the input. False for a dilated
// window that meets no input at all.
template <class Place>
WEFT_DEVICE bool locate(const PoolProblem& p, const device::Element& e, Place place,
                        int64_t (&at)[3]) {
  const auto flat = static_cast<unsigned>(place);
  const auto size_h = static_cast<unsigned>(p.window[1].size);
  const auto size_w = static_cast<unsigned>(p.window[2].size);
  at[0] = p.window[0].first_input(e.d) + flat / size_w / size_h * p.window[0].dilation;
  at[1] = p.window[1].first_input(e.h) + flat / size_w % size_h * p.window[1].dilation;
  at[2] = p.window[2].first_input(e.w) + flat % size_w * p.window[2].dilation;
  return at[0] < p.in[0] && at[1] < p.in[1] && at[2] < p.in[2];
}

template <class T, class Place>
WEFT_GLOBAL void max_pool_pick(PoolProblem p, const T* x, const Place* places, T* y) {
  const int64_t index = device::global_thread();
  if (index >= p.out_elements()) return;
  const device::Element e = device::split(index, p.out, p.inner);
  int64_t at[3];
  const bool inside = locate(p, e, load(places + index), at);
  store(y + index, inside ? load(x + flat_index(e, at[0], at[1], at[2], p.in, p.inner)) : T{});
}

template <class Place>
WEFT_GLOBAL void max_pool_indices(PoolProblem p, const Place* places, int64_t* indices) {
  const int64_t index = device::global_thread();
  if (index >= p.out_elements()) return;
  const device::Element e = device::split(index, p.out, p.inner);
  int64_t at[3];
  locate(p, e, load(places + index), at);
  store(indices + index, (at[0] * p.in[1] + at[1]) * p.in[2] + at[2]);
}

}  // namespace

void launch_max_backward(const PoolProblem& p, const void* gy, const void* places, void* gx,
                         const Context& context) {
  const PoolPlan plan = plan_here(p, PoolStep::max_backward);
  if (plan.path == PoolPlan::Path::tile && plan.tile.strip != 0)
    return launch_max_backward_columns(p, plan, gy, places, gx, context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      const auto* from = static_cast<const T*>(gy);
      const auto* kept = static_cast<const Place*>(places);
      auto* to = static_cast<T*>(gx);
      if (plan.path == PoolPlan::Path::walk)
        return device::launch(launch_of("max_pool_backward_walk", plan, context),
                              max_pool_backward_walk<T, Place>, p, from, kept, to);
      TileWalk walk = walk_of(p, PoolStep::max_backward, plan, from, to);
      // A thread's inputs in one row have windows of their own, so it takes one.
      walk.target_w = 1;
      walk.by_tile_w = Divider(walk.tile[3]);
      // Packs of places need as much alignment as packs of gradients.
      if (reinterpret_cast<uintptr_t>(kept) % 16 != 0) {
        walk.target_c = 1;
        walk.by_tile_c = Divider(walk.tile[4]);
      }
      device::launch(launch_of("max_pool_backward_tile", plan, context),
                     max_pool_backward_tile<T, Place>, walk,
                     box_layout(plan, walk, sizeof(T), from),
                     box_layout(plan, walk, sizeof(Place), kept), from, kept, to);
    });
  });
}

void launch_max_pick(const PoolProblem& p, const void* x, const void* places, void* y,
                     const Context& context) {
  const PoolPlan plan = plan_here(p, PoolStep::max_pick);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      device::launch(launch_of("max_pool_pick", plan, context), max_pool_pick<T, Place>, p,
                     static_cast<const T*>(x), static_cast<const Place*>(places),
                     static_cast<T*>(y));
    });
  });
}

void launch_max_indices(const PoolProblem& p, const void* places, int64_t* indices,
                        const Context& context) {
  const PoolPlan plan = plan_here(p, PoolStep::max_indices);
  dispatch_place(p, [&](auto place) {
    using Place = decltype(place);
    device::launch(launch_of("max_pool_indices", plan, context), max_pool_indices<Place>, p,
                   static_cast<const Place*>(places), indices);
  });
}

}  // namespace weft::WEFT_TARGET
