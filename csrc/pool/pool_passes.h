// Coordinates of the elements that the passes of a tile kernel make.
#pragma once

#include "pool/pool_tile.h"

namespace weft::WEFT_TARGET {
namespace {

// ---- the first pass: along W, from the box's rows to rows of the tile's width -------------------

// One or `pass_pack` neighbouring elements of [plane, row, w, c].
struct RowElement {
  int plane, row, w, c;
};

// Elements of the first pass, those of no tile included.
WEFT_DEVICE int row_items(const TileWalk& walk, const TileBlock& b) {
  return b.outers * b.box[0].size * walk.box[1] * walk.tile[3] * (walk.tile[4] / walk.pass_pack);
}

WEFT_DEVICE bool row_element(const TileWalk& walk, const TileBlock& b, int item, RowElement& e) {
  e.c = item;
  e.w = walk.by_row_c.split(e.c);
  e.c *= walk.pass_pack;
  e.row = walk.by_row_w.split(e.w);
  e.plane = walk.by_box_h.split(e.row);
  return e.row < b.box[1].size && e.w < b.extent[2] && e.c < b.channels;
}

// Where the first pass leaves its element.
WEFT_DEVICE int middle_index(const TileWalk& walk, int plane, int row, int w, int c) {
  return ((plane * walk.box[1] + row) * walk.tile[3] + w) * walk.tile[4] + c;
}

WEFT_DEVICE int middle_elements(const TileWalk& walk) {
  return walk.tile[0] * walk.box[0] * walk.box[1] * walk.tile[3] * walk.tile[4];
}

// ---- the last pass: the tile's own elements -----------------------------------------------------

// One or `target_w * target_c` neighbouring elements of [outer, d, h, w, c].
struct TileElement {
  int outer, d, h, w, c;
};

WEFT_DEVICE int tile_items(const TileWalk& walk, const TileBlock& b) {
  return b.outers * walk.tile[1] * walk.tile[2] * (walk.tile[3] / walk.target_w) *
         (walk.tile[4] / walk.target_c);
}

WEFT_DEVICE bool tile_element(const TileWalk& walk, const TileBlock& b, int item, TileElement& e) {
  e.c = item;
  e.w = walk.by_tile_c.split(e.c);
  e.c *= walk.target_c;
  e.h = walk.by_tile_w.split(e.w);
  e.w *= walk.target_w;
  e.d = walk.by_tile_h.split(e.h);
  e.outer = walk.by_tile_d.split(e.d);
  return e.d < b.extent[0] && e.h < b.extent[1] && e.w < b.extent[2] && e.c < b.channels;
}

// How far a tile's element lies from its first one, in the map.
WEFT_DEVICE int64_t target_offset(const TileWalk& walk, const TileElement& e) {
  return (((e.outer * walk.target[0] + e.d) * walk.target[1] + e.h) * walk.target[2] + e.w) *
             walk.inner +
         e.c;
}

// N values that lie together in shared memory, aligned as a pack where a pack holds them.
template <int N, class T>
WEFT_DEVICE void load_values(const T* from, T (&values)[N]) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  constexpr int kPack = N < kMost ? N : kMost;
  for (int i = 0; i < N; i += kPack) {
    const auto pack = *reinterpret_cast<const device::Pack<T, kPack>*>(from + i);
    for (int j = 0; j < kPack; ++j) values[i + j] = pack[j];
  }
}

template <int N, class T>
WEFT_DEVICE void keep_values(T* to, const T (&values)[N]) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  constexpr int kPack = N < kMost ? N : kMost;
  for (int i = 0; i < N; i += kPack) {
    device::Pack<T, kPack> pack;
    for (int j = 0; j < kPack; ++j) pack[j] = values[i + j];
    *reinterpret_cast<device::Pack<T, kPack>*>(to + i) = pack;
  }
}

// The same to global memory.
template <int N, class T>
WEFT_DEVICE void store_values(T* to, const T (&values)[N]) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  constexpr int kPack = N < kMost ? N : kMost;
  for (int i = 0; i < N; i += kPack) {
    if constexpr (kPack == 1) {
      device::store(to + i, values[i]);
    } else {
      device::Pack<T, kPack> pack;
      for (int j = 0; j < kPack; ++j) pack[j] = values[i + j];
      device::store(to + i, pack);
    }
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
