// What the kernels of whole sequences share: rows staged in shared memory, and their products with
// weights that stay there. For .cu files alone.
#pragma once

#include "device/grid.h"
#include "rnn/rnn_layer_unit.h"
#include "rnn/rnn_sequence_plan.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// The part of the problem that a block owns.
struct Share {
  int first_unit, units;    // of H
  int first_state, states;  // of S
  int64_t first_row;        // of B
  int rows;
};
WEFT_DEVICE int share_of(int64_t whole, int64_t first, int64_t part) {
  const int64_t left = whole - first;
  return static_cast<int>(left < 0 ? 0 : left < part ? left : part);
}
WEFT_DEVICE Share share_of_block(const LayerProblem& p, const SequencePlan& plan) {
  const int64_t across = device::block_index() % plan.unit_blocks,
                down = device::block_index() / plan.unit_blocks;
  const int64_t unit = across * plan.units, state = across * plan.states, row = down * plan.rows;
  return {static_cast<int>(unit),
          share_of(p.hidden, unit, plan.units),
          static_cast<int>(state),
          share_of(p.state(), state, plan.states),
          row,
          share_of(p.batch, row, plan.rows)};
}

// Rows of `length` elements to shared memory, `pitch` apart, zeros up to a whole pack; row i begins
// at row_at(i). `factor_at(i)` is what multiplies it, null for one.
template <class T, class RowAt, class FactorAt>
WEFT_DEVICE void stage(int rows, int length, int pitch, T* to, const RowAt& row_at,
                       const FactorAt& factor_at) {
  const int packs = ceil_div(length, kPack<T>), threads = device::block_size();
  for (int i = device::thread_index(); i < rows * packs; i += threads) {
    const int row = i / packs, column = i % packs * kPack<T>;
    const T* from = row_at(row) + column;
    const T* factor = factor_at(row);
    T* place = to + row * pitch + column;
    const bool whole = column + kPack<T> <= length &&
                       reinterpret_cast<uintptr_t>(from) % (kPack<T> * sizeof(T)) == 0;
    if (whole && factor == nullptr) {
      device::cp_async<16>(place, from);
      continue;
    }
    for (int e = 0; e < kPack<T>; ++e) {
      const bool inside = column + e < length;
      T value = inside ? load(from + e) : T{};
      if (inside && factor) value = narrow<T>(widen(value) * widen(load(factor + column + e)));
      place[e] = value;
    }
  }
  device::cp_async_commit();
}
template <class T, class RowAt>
WEFT_DEVICE void stage(int rows, int length, int pitch, T* to, const RowAt& row_at) {
  stage(rows, length, pitch, to, row_at, [](int) -> const T* { return nullptr; });
}

// sums [rows, columns] of products of rows of `a` and of `b`, both `pitch` apart, of `length`
// elements. A warp makes tiles of 4 x 4, its lanes share the length: neighbouring lanes read
// neighbouring packs. The lanes' parts are added by halving, which leaves a sum to a pair of lanes.
template <class T, class Acc>
WEFT_DEVICE void resident_product(int rows, int columns, int length, int pitch, const T* a,
                                  const T* b, Acc* sums) {
  using Packed = device::Pack<T, kPack<T>>;
  constexpr int kTile = kSequenceTile;
  const int across = ceil_div(columns, kTile), tiles = ceil_div(rows, kTile) * across;
  for (int tile = device::thread_index() / 32; tile < tiles; tile += device::block_size() / 32) {
    const int first_row = tile / across * kTile, first_column = tile % across * kTile;
    const T *of_row[kTile], *of_column[kTile];
    for (int i = 0; i < kTile; ++i) {  // beyond the edge: the last one again
      const int row = first_row + i, column = first_column + i;
      of_row[i] = a + (row < rows ? row : rows - 1) * pitch;
      of_column[i] = b + (column < columns ? column : columns - 1) * pitch;
    }
    Acc part[kTile * kTile] = {};
    for (int k = device::lane() * kPack<T>; k < length; k += 32 * kPack<T>) {
      Packed row[kTile];
      for (int i = 0; i < kTile; ++i) row[i] = *reinterpret_cast<const Packed*>(of_row[i] + k);
      for (int j = 0; j < kTile; ++j) {
        const Packed column = *reinterpret_cast<const Packed*>(of_column[j] + k);
        for (int i = 0; i < kTile; ++i)
          for (int e = 0; e < kPack<T>; ++e)
            part[i * kTile + j] += widen(row[i][e]) * widen(column[e]);
      }
    }
    for (int half = kTile * kTile / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
      const bool upper = (device::lane() & mask) != 0;
      for (int i = 0; i < half; ++i) {
        const Acc sent = upper ? part[i] : part[half + i];
        part[i] = (upper ? part[half + i] : part[i]) + device::shuffle_xor(sent, mask);
      }
    }
    const Acc sum = part[0] + device::shuffle_xor(part[0], 1);
    const int place = device::lane() / 2;
    const int row = first_row + place / kTile, column = first_column + place % kTile;
    if (device::lane() % 2 == 0 && row < rows && column < columns)
      sums[row * columns + column] = sum;
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
