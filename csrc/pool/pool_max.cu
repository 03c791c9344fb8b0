// Max pooling on CUDA, forward: maxima, and the places where they are.
//
// As averages (pool_avg.cu): a block copies the box of inputs that its tile of outputs needs to
// shared memory and takes maxima along W, then along D and H. Row by row that is the order in which
// a window's places count, so the first of equal values and the last NaN win in both passes, and
// what the first pass keeps is a value of the input's own dtype and a place inside W. Long windows
// that hardly overlap are reduced by a block each; windows with gaps are walked. Bound: bytes.
#include <limits>

#include "pool/pool_cuda.h"
#include "pool/pool_long_windows.h"
#include "pool/pool_passes.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

template <class T>
WEFT_DEVICE accumulate_t<T> lowest() {
  return -std::numeric_limits<accumulate_t<T>>::infinity();
}

// A maximum and its place; values come in the order of their places.
template <class Acc, class Index>
struct Best {
  Acc value;
  Index place;

  WEFT_DEVICE void take(Acc other, Index other_place) {
    if (other > value || other != other) {
      value = other;
      place = other_place;
    }
  }
  // The same in any order: the larger value; the first of equal ones, the last NaN.
  WEFT_DEVICE void merge(Acc other, Index other_place) {
    const bool nan = value != value;
    const bool replace = other != other
                             ? !nan || other_place > place
                             : !nan && (other > value || (other == value && other_place < place));
    if (!replace) return;
    value = other;
    place = other_place;
  }
};

// `kKeep`: places are wanted. Without them their part of the arithmetic is dead, and goes. Between
// the passes a place inside W is kept as a `Column`.
template <class T, class Place, class Column, bool kKeep>
struct MaxTile {
  using Acc = accumulate_t<T>;
  static constexpr int kPackElements = 16 / sizeof(T);
  const TileWalk& walk;
  const TileBlock& block;
  const BoxLayout& layout;
  device::SharedMemory& shared;
  const T* x;
  T* y;
  Place* places;
  T* piece = shared.take<T>(layout.elements);
  T* middle = shared.take<T>(middle_elements(walk));
  Column* middle_columns = kKeep ? shared.take<Column>(middle_elements(walk)) : nullptr;
  const T* box = nullptr;
  ReachTables reaches = {};

  WEFT_DEVICE void load(const TileBlock& chunk) { box = load_box(walk, chunk, layout, x, piece); }
  WEFT_DEVICE void make_tables() { reaches = reach_tables(walk, block, shared); }
  WEFT_DEVICE void make_rows(const TileBlock& chunk, int row) const {
    if (walk.pass_pack > 1)
      max_rows<kPackElements>(chunk, row);
    else
      max_rows<1>(chunk, row);
  }
  WEFT_DEVICE void make_tile(const TileBlock& strip, int first) const {
    if (walk.target_w * walk.target_c > 1)
      max_planes<kPackElements>(strip, first);
    else
      max_planes<1>(strip, first);
  }

  // Maxima along W of kPack neighbouring channels, and their places in W: the rows of a chunk's
  // box, of which the first is row `row` of the block's, to the middle.
  template <int kPack>
  WEFT_DEVICE void max_rows(const TileBlock& chunk, int row) const {
    const int items = row_items(walk, chunk);
    const int ring = row % walk.kept_rows;
    const int dilation = walk.axis[2].dilation;
    const int step = dilation * walk.tile[4];
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      RowElement e;
      if (!row_element(walk, chunk, item, e)) continue;
      const Reach reach = reaches.axis[2][e.w];
      Best<Acc, int> best[kPack];
      for (int i = 0; i < kPack; ++i) best[i] = {lowest<T>(), reach.place};
      const T* from = box + e.plane * layout.plane_pitch + e.row * layout.row_pitch +
                      reach.begin * walk.tile[4] + e.c;
      int place = reach.place;
      for (int w = reach.begin; w < reach.end; w += dilation, from += step, ++place) {
        T values[kPack];
        load_values(from, values);
        for (int i = 0; i < kPack; ++i) best[i].take(widen(values[i]), place);
      }
      T values[kPack];
      Column columns[kPack];
      for (int i = 0; i < kPack; ++i) {
        values[i] = narrow<T>(best[i].value);
        columns[i] = static_cast<Column>(best[i].place);
      }
      const int at = middle_index(walk, e.plane, ring_row(walk, ring, e.row), e.w, e.c);
      keep_values(middle + at, values);
      if constexpr (kKeep) keep_values(middle_columns + at, columns);
    }
  }

  // Maxima of those along D and H, of kPack neighbours in W (contiguous) or C: a strip of the tile,
  // from its row `first` on.
  template <int kPack>
  WEFT_DEVICE void max_planes(const TileBlock& strip, int first) const {
    const int64_t start = tile_start(walk, strip);
    const int items = tile_items(walk, strip);
    const int size_h = walk.axis[1].size;
    const int size_w = walk.axis[2].size;
    const int dilation_d = walk.axis[0].dilation;
    const int dilation_h = walk.axis[1].dilation;
    const int row_step = walk.tile[3] * walk.tile[4];
    for (int item = device::thread_index(); item < items; item += device::block_size()) {
      TileElement e;
      if (!tile_element(walk, strip, item, e)) continue;
      const Reach d = reaches.axis[0][e.d];
      const Reach h = reaches.axis[1][first + e.h];
      Best<Acc, int> best[kPack];
      for (int i = 0; i < kPack; ++i) {
        const int w = walk.target_w > 1 ? e.w + i : e.w;
        best[i] = {lowest<T>(), (d.place * size_h + h.place) * size_w + reaches.axis[2][w].place};
      }
      int first_place = (d.place * size_h + h.place) * size_w;
      const int ring = h.begin % walk.kept_rows;
      for (int plane = d.begin; plane < d.end; plane += dilation_d) {
        const int from = middle_index(walk, e.outer * strip.box[0].size + plane, 0, e.w, e.c);
        int place = first_place;
        int row = ring;
        for (int i = h.begin; i < h.end; i += dilation_h, place += size_w) {
          const int at = from + row * row_step;
          row = ring_row(walk, row, dilation_h);
          T values[kPack];
          load_values(middle + at, values);
          Column columns[kPack] = {};
          if constexpr (kKeep) load_values(middle_columns + at, columns);
          for (int n = 0; n < kPack; ++n)
            best[n].take(widen(values[n]), place + static_cast<int>(columns[n]));
        }
        first_place += size_h * size_w;
      }
      T values[kPack];
      Place kept[kPack];
      for (int i = 0; i < kPack; ++i) {
        values[i] = narrow<T>(best[i].value);
        kept[i] = static_cast<Place>(best[i].place);
      }
      const int64_t offset = start + target_offset(walk, e);
      store_values(y + offset, values);
      if constexpr (kKeep) store_values(places + offset, kept);
    }
  }
};

template <class T, class Place, class Column, bool kKeep>
WEFT_GLOBAL WEFT_HOT void max_pool_tile(TileWalk walk, BoxLayout layout, const T* x, T* y,
                                        Place* places) {
  device::SharedMemory shared;
  const TileBlock block = block_of(walk);
  MaxTile<T, Place, Column, kKeep> work{walk, block, layout, shared, x, y, places};
  for_strips(walk, block, work);
}

// ---- long windows -------------------------------------------------------------------------------

// Contiguous maps: a block an output.
template <class T, class Place, bool kKeep>
WEFT_GLOBAL WEFT_HOT void max_pool_reduce_rows(PoolProblem p, const T* x, T* y, Place* places) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* values = shared.take<Acc>(kReduceWarps);
  int64_t* value_places = shared.take<int64_t>(kReduceWarps);
  const int64_t index = device::block_index();
  const WindowRows rows = window_rows(p, index);
  Best<Acc, int64_t> best{lowest<T>(), rows.place};
  for_window_rows(rows, x, [&](Acc value, int64_t place) { best.take(value, place); });
  for (int mask = 16; mask > 0; mask /= 2) {
    const Acc other = device::shuffle_xor(best.value, mask);
    const int64_t other_place = device::shuffle_xor(best.place, mask);
    best.merge(other, other_place);
  }
  if (device::lane() == 0) {
    values[device::thread_index() / 32] = best.value;
    value_places[device::thread_index() / 32] = best.place;
  }
  device::barrier();
  if (device::thread_index() != 0) return;
  for (int i = 1; i < kReduceWarps; ++i) best.merge(values[i], value_places[i]);
  store(y + index, narrow<T>(best.value));
  if constexpr (kKeep) store(places + index, static_cast<Place>(best.place));
}

// Channels-last maps: a block a run of channels of an output; kPack channels a thread.
template <class T, class Place, bool kKeep, int kPack>
WEFT_GLOBAL WEFT_HOT void max_pool_reduce_channels(PoolProblem p, int run, const T* x, T* y,
                                                   Place* places) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* values = shared.take<Acc>(kReduceThreads * kPack);
  int* value_places = shared.take<int>(kReduceThreads * kPack);
  const ChannelRun r = channel_run<kPack>(p, run);
  int64_t first = 0;
  for (int a = 0; a < 3; ++a) {
    const int64_t at[3] = {r.at.d, r.at.h, r.at.w};
    first = first * p.window[a].size + places_inside(p.window[a], at[a], p.in[a]).begin;
  }
  Best<Acc, int> best[kPack];
  for (int i = 0; i < kPack; ++i) best[i] = {lowest<T>(), static_cast<int>(first)};
  for_window_positions(p, r, [&](int64_t offset, int64_t place) {
    T read[kPack];
    read_values(x + offset, read);
    for (int i = 0; i < kPack; ++i) best[i].take(widen(read[i]), static_cast<int>(place));
  });
  const int mine = device::thread_index() * kPack;
  for (int i = 0; i < kPack; ++i) {
    values[mine + i] = best[i].value;
    value_places[mine + i] = best[i].place;
  }
  for (int groups = r.groups; groups > 1;) {
    const int half = (groups + 1) / 2;
    device::barrier();
    if (r.group + half < groups && r.group < half) {
      for (int i = 0; i < kPack; ++i) {
        const int theirs = mine + half * r.lanes * kPack + i;
        best[i].merge(values[theirs], value_places[theirs]);
        values[mine + i] = best[i].value;
        value_places[mine + i] = best[i].place;
      }
    }
    groups = half;
  }
  if (r.group != 0 || !r.works) return;
  T results[kPack];
  Place kept[kPack];
  for (int i = 0; i < kPack; ++i) {
    results[i] = narrow<T>(best[i].value);
    kept[i] = static_cast<Place>(best[i].place);
  }
  store_values(y + r.target, results);
  if constexpr (kKeep) store_values(places + r.target, kept);
}

// ---- windows with gaps, or too large for shared memory ------------------------------------------

template <class T, class Place, bool kKeep>
WEFT_GLOBAL void max_pool_walk(PoolProblem p, const T* x, T* y, Place* places) {
  const int64_t index = device::global_thread();
  if (index >= p.out_elements()) return;
  const device::Element e = device::split(index, p.out, p.inner);
  const Range kd = places_inside(p.window[0], e.d, p.in[0]);
  const Range kh = places_inside(p.window[1], e.h, p.in[1]);
  const Range kw = places_inside(p.window[2], e.w, p.in[2]);
  Best<accumulate_t<T>, int64_t> best{
      lowest<T>(), (kd.begin * p.window[1].size + kh.begin) * p.window[2].size + kw.begin};
  for (int64_t i = kd.begin; i < kd.end; ++i)
    for (int64_t j = kh.begin; j < kh.end; ++j)
      for (int64_t k = kw.begin; k < kw.end; ++k) {
        const int64_t d = p.window[0].first_input(e.d) + i * p.window[0].dilation;
        const int64_t h = p.window[1].first_input(e.h) + j * p.window[1].dilation;
        const int64_t w = p.window[2].first_input(e.w) + k * p.window[2].dilation;
        best.take(widen(load(x + flat_index(e, d, h, w, p.in, p.inner))),
                  (i * p.window[1].size + j) * p.window[2].size + k);
      }
  store(y + index, narrow<T>(best.value));
  if constexpr (kKeep) store(places + index, static_cast<Place>(best.place));
}

template <class T, class Place, bool kKeep>
void launch_forward(const PoolProblem& p, const T* x, T* y, Place* places, const Context& context) {
  constexpr PoolStep kStep = kKeep ? PoolStep::max_forward_places : PoolStep::max_forward;
  const PoolPlan plan = plan_here(p, kStep);
  if (plan.path == PoolPlan::Path::tile) {
    const TileWalk walk = walk_of(p, kStep, plan, x, y);
    const auto kernel = pool_plan::column_bytes(p) == 1 ? max_pool_tile<T, Place, uint8_t, kKeep>
                                                        : max_pool_tile<T, Place, Place, kKeep>;
    return device::launch(launch_of("max_pool_tile", plan, context), kernel, walk,
                          box_layout(plan, walk, sizeof(T), x), x, y, places);
  }
  if (plan.path == PoolPlan::Path::walk)
    return device::launch(launch_of("max_pool_walk", plan, context), max_pool_walk<T, Place, kKeep>,
                          p, x, y, places);
  if (p.inner == 1)
    return device::launch(launch_of("max_pool_reduce_rows", plan, context),
                          max_pool_reduce_rows<T, Place, kKeep>, p, x, y, places);
  const auto run = static_cast<int>(plan.tile.c);
  const auto config = launch_of("max_pool_reduce_channels", plan, context);
  constexpr int kPack = 16 / sizeof(T);
  if (has_channel_packs(p, kPack, x))
    device::launch(config, max_pool_reduce_channels<T, Place, kKeep, kPack>, p, run, x, y, places);
  else
    device::launch(config, max_pool_reduce_channels<T, Place, kKeep, 1>, p, run, x, y, places);
}

}  // namespace

void launch_max_forward(const PoolProblem& p, const void* x, void* y, void* places,
                        const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    if (places == nullptr) return launch_forward<T, uint8_t, false>(p, from, to, nullptr, context);
    dispatch_place(p, [&](auto place) {
      using Place = decltype(place);
      launch_forward<T, Place, true>(p, from, to, static_cast<Place*>(places), context);
    });
  });
}

}  // namespace weft::WEFT_TARGET
