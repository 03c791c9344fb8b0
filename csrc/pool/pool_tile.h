// The box of sources that a block copies to shared memory, and the tile of targets it makes of it.
//
// A box is [planes][rows][w][c]: planes are the D positions of one or several outer indices, which
// are neighbours in memory. Its rows lie in shared memory as far from a 16-byte boundary as they
// do in global memory, so whole packs are copied asynchronously whatever the alignment of the map
// and the oddness of its width, and only the ends of a run go element by element.
#pragma once

#include "device/index.h"
#include "pool/pool_plan_cuda.h"

namespace weft::WEFT_TARGET {
namespace {

using device::Divider;

// How one tensor's box lies in shared memory.
struct BoxLayout {
  int row_pitch;    // elements from row to row
  int plane_pitch;  // from plane to plane
  int elements;     // of the piece of shared memory that holds it
  int unit;         // elements copied at a time: a pack, or 1
  int packs;        // that a run may touch
  Divider by_packs;
};

// Everything that is equal for all blocks of a launch.
struct TileWalk {
  PoolAxis axis[3];
  bool inverse;
  int64_t outer;
  int inner;
  int64_t source[3];
  int64_t target[3];

  int tile[5];        // outer, d, h, w, c
  unsigned parts[5];  // tiles along each
  int box[3];         // largest box: planes of one outer index, rows, w
  int strip;          // rows of the tile that are made at a time
  int loaded_rows;    // rows of the box that are loaded at a time
  int kept_rows;      // rows of the box that are kept, reduced along W
  int pass_pack;      // channels that a thread of the first pass takes together
  int target_w;       // w and c that a thread of the last pass takes together
  int target_c;
  Divider by_loaded_rows, by_row_w, by_row_c, by_box_w;  // first pass: rows of w of c
  Divider by_tile_d, by_strip, by_tile_w, by_tile_c;     // last pass
  int64_t divisor;                                       // of averages, or 0: by the counts
};

// A block's tile: where it begins and ends, and its box.
struct TileBlock {
  int64_t outer;
  int at[3];
  int c;
  int outers;
  int extent[3];
  int channels;
  Hull box[3];
};

WEFT_DEVICE int clipped(int extent, int64_t first, int64_t end) {
  return first + extent <= end ? extent : static_cast<int>(end - first);
}

WEFT_DEVICE TileBlock block_of(const TileWalk& walk) {
  auto index = static_cast<unsigned>(device::block_index());
  const auto next = [&](int a) {
    const unsigned part = index % walk.parts[a];
    index /= walk.parts[a];
    return static_cast<int>(part) * walk.tile[a];
  };
  TileBlock b;
  b.c = next(4);
  b.channels = clipped(walk.tile[4], b.c, walk.inner);
  for (int a = 2; a >= 0; --a) {
    b.at[a] = next(a + 1);
    b.extent[a] = clipped(walk.tile[a + 1], b.at[a], walk.target[a]);
    b.box[a] = hull_of(walk.axis[a], walk.inverse, b.at[a], b.extent[a]);
  }
  b.outer = static_cast<int64_t>(index) * walk.tile[0];
  b.outers = clipped(walk.tile[0], b.outer, walk.outer);
  // Planes of several outer indices are one run of planes, with those that no window meets.
  if (walk.tile[0] > 1) b.box[0] = {0, static_cast<int>(walk.source[0])};
  return b;
}

// The flat index of the first element of a block's box, and of its tile.
WEFT_DEVICE int64_t box_start(const TileWalk& walk, const TileBlock& b) {
  return (((b.outer * walk.source[0] + b.box[0].begin) * walk.source[1] + b.box[1].begin) *
              walk.source[2] +
          b.box[2].begin) *
             walk.inner +
         b.c;
}

WEFT_DEVICE int64_t tile_start(const TileWalk& walk, const TileBlock& b) {
  return (((b.outer * walk.target[0] + b.at[0]) * walk.target[1] + b.at[1]) * walk.target[2] +
          b.at[2]) *
             walk.inner +
         b.c;
}

// Elements from the last 16-byte boundary to `address`.
template <class T>
WEFT_DEVICE int elements_past_boundary(const T* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// Starts the copy of a block's box, of which `loaded_rows` rows at most; complete after
// cp_async_wait<0> and a barrier. Returns where in `shared` element (0, 0, 0, 0) of the box is.
template <class T>
WEFT_DEVICE T* load_box(const TileWalk& walk, const TileBlock& b, const BoxLayout& layout,
                        const T* map, T* shared) {
  constexpr int kPackElements = 16 / sizeof(T);
  const T* from = map + box_start(walk, b);
  T* to = shared + (layout.unit == 1 ? 0 : elements_past_boundary(from));
  const int64_t row_step = walk.source[2] * walk.inner;
  const int64_t plane_step = walk.source[1] * row_step;
  // Runs: whole rows where a tile has all channels, else the channels of one position.
  const bool whole = b.channels == walk.inner;
  const int run = whole ? b.box[2].size * walk.inner : b.channels;
  const int positions = whole ? 1 : b.box[2].size;
  const int planes = b.outers * b.box[0].size;
  const int stride = device::block_size();
  const int items = planes * walk.loaded_rows * (whole ? 1 : walk.box[2]) * layout.packs;
  for (int item = device::thread_index(); item < items; item += stride) {
    int pack = item;
    int position = layout.by_packs.split(pack);
    int row = whole ? position : walk.by_box_w.split(position);
    if (whole) position = 0;
    const int plane = walk.by_loaded_rows.split(row);
    if (row >= b.box[1].size || position >= positions) continue;
    const int at = plane * layout.plane_pitch + row * layout.row_pitch + position * walk.tile[4];
    const T* source = from + plane * plane_step + row * row_step + position * walk.inner;
    if (layout.unit == 1) {
      if (pack < run) to[at + pack] = device::load(source + pack);
      continue;
    }
    const int first = pack * kPackElements - elements_past_boundary(source);
    if (first >= 0 && first + kPackElements <= run) {
      device::cp_async<16>(to + at + first, source + first);
      continue;
    }
    for (int i = first; i < first + kPackElements; ++i)
      if (i >= 0 && i < run) to[at + i] = device::load(source + i);
  }
  device::cp_async_commit();
  return to;
}

// The tables of a tile's reaches, one axis after another, relative to the box.
struct ReachTables {
  Reach* axis[3];
};

WEFT_DEVICE ReachTables reach_tables(const TileWalk& walk, const TileBlock& b,
                                     device::SharedMemory& shared) {
  ReachTables tables;
  for (int a = 0; a < 3; ++a) {
    tables.axis[a] = shared.take<Reach>(walk.tile[a + 1]);
    for (int i = device::thread_index(); i < b.extent[a]; i += device::block_size()) {
      const PoolAxis& axis = walk.axis[a];
      Reach reach =
          walk.inverse ? inverse_reach(axis, b.at[a] + i) : forward_reach(axis, b.at[a] + i);
      if (reach.begin < reach.end) {
        reach.begin -= b.box[a].begin;
        reach.end -= b.box[a].begin;
      }
      tables.axis[a][i] = reach;
    }
  }
  return tables;
}

// ---- on the host -------------------------------------------------------------------------------

// `packs` and pitches of a tensor with elements of `bytes` bytes, at `address`.
inline BoxLayout box_layout(const PoolPlan& plan, const TileWalk& walk, int64_t bytes,
                            const void* address) {
  const int64_t pack = 16 / bytes;
  const bool whole = walk.tile[4] == walk.inner;
  const int64_t run = whole ? plan.box[2] * walk.inner : walk.tile[4];
  const int64_t row = plan.box[2] * walk.tile[4];
  // A pitch of at least `least` that leaves the same remainder of a pack as the map's.
  const auto congruent = [&](int64_t least, int64_t map) {
    return least + ((map - least) % pack + pack) % pack;
  };
  const int64_t row_step = walk.source[2] * walk.inner;
  const int64_t plane_step = walk.source[1] * row_step;
  const int64_t planes = plan.tile.outer * plan.box[0];
  const bool regular = whole || (walk.inner % pack == 0 && walk.tile[4] % pack == 0);
  BoxLayout layout;
  layout.unit = static_cast<int>(regular ? pack : 1);
  const int64_t row_pitch = regular ? congruent(row, row_step) : row;
  const int64_t plane_pitch =
      regular ? congruent(plan.rows.loaded * row_pitch, plane_step) : plan.rows.loaded * row_pitch;
  layout.row_pitch = static_cast<int>(row_pitch);
  layout.plane_pitch = static_cast<int>(plane_pitch);
  layout.elements = static_cast<int>(planes * plane_pitch + (regular ? pack - 1 : 0));
  // Boxes begin anywhere in a row of contiguous maps.
  const bool aligned =
      reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
      (walk.inner % pack == 0 || (plan.box[2] == walk.source[2] && row_step % pack == 0));
  layout.packs = static_cast<int>(!regular ? run : ceil_div(run + (aligned ? 0 : pack - 1), pack));
  layout.by_packs = Divider(layout.packs);
  return layout;
}

// The divisor of every window, or 0 if windows differ.
inline int64_t common_divisor(const PoolProblem& p) {
  if (p.divisor != 0) return p.divisor;
  int64_t divisor = 1;
  for (int a = 0; a < 3; ++a) {
    const PoolWindow& w = p.window[a];
    if (w.adaptive()) {
      if (p.in[a] % p.out[a] != 0) return 0;
      divisor *= p.in[a] / p.out[a];
      continue;
    }
    const int64_t end = w.first_input(p.out[a] - 1) + w.size;
    const int64_t padding = p.count_include_pad ? w.padding : 0;
    if (end > p.in[a] + padding || padding != w.padding) return 0;
    divisor *= w.size;
  }
  return divisor;
}

// `target` is where the kernel stores: its alignment decides how wide.
inline TileWalk walk_of(const PoolProblem& p, PoolStep step, const PoolPlan& plan,
                        const void* source, const void* target) {
  TileWalk walk;
  walk.inverse = is_inverse(step);
  walk.outer = p.outer;
  walk.inner = static_cast<int>(p.inner);
  const int64_t tile[5] = {plan.tile.outer, plan.tile.d, plan.tile.h, plan.tile.w, plan.tile.c};
  walk.strip = static_cast<int>(plan.tile.strip == 0 ? plan.tile.h : plan.tile.strip);
  walk.loaded_rows = static_cast<int>(plan.rows.loaded);
  walk.kept_rows = static_cast<int>(plan.rows.kept);
  for (int a = 0; a < 3; ++a) {
    walk.axis[a] = axis_of(p, a);
    walk.source[a] = walk.inverse ? p.out[a] : p.in[a];
    walk.target[a] = walk.inverse ? p.in[a] : p.out[a];
    walk.box[a] = static_cast<int>(plan.box[a]);
  }
  const int64_t whole[5] = {p.outer, walk.target[0], walk.target[1], walk.target[2], p.inner};
  for (int a = 0; a < 5; ++a) {
    walk.tile[a] = static_cast<int>(tile[a]);
    walk.parts[a] = static_cast<unsigned>(ceil_div(whole[a], tile[a]));
  }
  const auto pack = static_cast<int>(16 / size_of(p.dtype));
  const auto aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  };
  const bool channel_packs = p.inner % pack == 0 && tile[4] % pack == 0 && aligned(source);
  walk.pass_pack = channel_packs ? pack : 1;
  walk.target_c = channel_packs && aligned(target) ? pack : 1;
  const bool row_packs =
      p.inner == 1 && walk.target[2] % pack == 0 && tile[3] % pack == 0 && aligned(target);
  walk.target_w = row_packs ? pack : 1;
  walk.by_loaded_rows = Divider(walk.loaded_rows);
  walk.by_box_w = Divider(walk.box[2]);
  walk.by_row_w = Divider(tile[3]);
  walk.by_row_c = Divider(ceil_div(tile[4], walk.pass_pack));
  walk.by_tile_d = Divider(tile[1]);
  walk.by_strip = Divider(walk.strip);
  walk.by_tile_w = Divider(tile[3] / walk.target_w);
  walk.by_tile_c = Divider(ceil_div(tile[4], walk.target_c));
  walk.divisor = common_divisor(p);
  return walk;
}

inline int64_t box_bytes(const BoxLayout& layout, int64_t bytes) {
  return pool_plan::round_up(layout.elements * bytes, 16);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
