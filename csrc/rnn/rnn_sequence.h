// What the kernels of whole sequences share: rows staged in shared memory, and their products with
// weights that stay there. For .cu files alone.
#pragma once

#include "device/grid.h"
#include "device/mma.h"
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

// // Rows of `length` elements to shared memory, `pitch` apart, with zeros behind them; row i
// begins at row_at(i). `factor_at(i)` is what multiplies it, null for one.
template <class T, class RowAt, class FactorAt>
WEFT_DEVICE void stage(int rows, int length, int pitch, T* to, const RowAt& row_at,
                       const FactorAt& factor_at) {
  const int packs = static_cast<int>(sequence_packs(length, sizeof(T))),
            threads = device::block_size();
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

// The same on tensor cores: a warp makes 16 x 32 sums of a slice of the length, and the slices are
// added up behind a barrier of the block.
template <class T>
WEFT_DEVICE void tensor_product(int rows, int columns, int length, int pitch, const T* a,
                                const T* b, float* sums) {
  using Core = device::Mma<T>;
  constexpr int kColumnTiles = kTensorColumns / Core::kN;
  const int lane = device::lane(), warps = device::block_size() / 32;
  const int across = ceil_div(columns, kTensorColumns);
  const auto tiles = static_cast<int>(tensor_tiles(rows, columns));
  const auto slices = static_cast<int>(tensor_slices(rows, columns));
  const int steps = ceil_div(length, Core::kK);
  for (int item = device::thread_index() / 32; item < tiles * slices; item += warps) {
    const int tile = item % tiles, slice = item / tiles;
    const int first_row = tile / across * kTensorRows,
              first_column = tile % across * kTensorColumns;
    // Beyond the edge: the last row or column again.
    const int row = first_row + lane % 16, column = first_column + lane % 8 + lane / 16 * 8;
    const T* of_row = a + (row < rows ? row : rows - 1) * pitch + lane / 16 * 8;
    const T* of_column[2];
    for (int i = 0; i < 2; ++i) {
      const int at = column + 16 * i;
      of_column[i] = b + (at < columns ? at : columns - 1) * pitch + lane / 8 % 2 * 8;
    }
    typename Core::C part[kColumnTiles] = {};
    for (int step = steps * slice / slices; step < steps * (slice + 1) / slices; ++step) {
      const auto row_part = device::ldmatrix(of_row + step * Core::kK);
      for (int i = 0; i < 2; ++i) {
        const auto pair = device::ldmatrix(of_column[i] + step * Core::kK);
        device::mma<T>(part[2 * i], row_part, {{pair[0], pair[1]}});
        device::mma<T>(part[2 * i + 1], row_part, {{pair[2], pair[3]}});
      }
    }
    for (int j = 0; j < kColumnTiles; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int to_row = first_row + lane / 4 + i / 2 * 8,
                  to_column = first_column + j * Core::kN + lane % 4 * 2 + i % 2;
        if (to_row < rows && to_column < columns)
          sums[(slice * rows + to_row) * columns + to_column] = part[j][i];
      }
    }
  }
  if (slices == 1) return;
  device::barrier();
  for (int i = device::thread_index(); i < rows * columns; i += device::block_size()) {
    float sum = sums[i];
    for (int slice = 1; slice < slices; ++slice) sum += sums[slice * rows * columns + i];
    sums[i] = sum;
  }
}

// The product as the plan has it. Sums are there after the block's next barrier.
template <class T, class Acc>
WEFT_DEVICE void planned_product(const SequencePlan& plan, int rows, int columns, int length,
                                 int pitch, const T* a, const T* b, Acc* sums) {
  if constexpr (sizeof(T) == 2) {
    if (plan.tensor_cores) return tensor_product(rows, columns, length, pitch, a, b, sums);
  }
  resident_product(rows, columns, length, pitch, a, b, sums);
}

}  // namespace
}  // namespace weft::WEFT_TARGET
