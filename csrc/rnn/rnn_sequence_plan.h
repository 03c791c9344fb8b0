// Whether one CUDA kernel takes all steps of a recurrent layer, and how: a pure function of the
// problem and of what the device runs at once, free of torch.
//
// The grid is a rectangle: `unit_blocks` across the hidden units, each with its units' rows of the
// weights in shared memory for the whole sequence, by `row_blocks` across the batch. The blocks of
// one slice of the batch are neighbours and meet at each step. More slices shorten the products and
// repeat the weights; the cheapest that fits is taken. Where none does, each step is kernels of its
// own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/window.h"
#include "device/grid_facts.h"
#include "rnn/rnn_layer.h"

namespace weft {

inline constexpr int64_t kSequenceFlags = 1024;  // a grid has at most so many blocks
inline constexpr int kSequenceTile = 4;          // rows and columns of a product that a warp makes
inline constexpr int kSequenceWarps = 8;         // at most, per block
inline constexpr int kTensorRows = 16;           // rows and columns of one on tensor cores
inline constexpr int kTensorColumns = 32;

struct SequencePlan {
  int64_t unit_blocks = 0;  // zero: a kernel a step
  int64_t row_blocks = 0;
  int64_t units = 0;         // of a block
  int64_t states = 0;        // of a block, of S: its units, or its share of the projection
  int64_t rows = 0;          // of a block
  int64_t staged_rows = 0;   // whose states are in shared memory at once
  int64_t shared_bytes = 0;  // of a block
  int threads = 0;
  bool tensor_cores = false;  // products of half types in float32

  constexpr bool persistent() const { return unit_blocks > 0; }
  constexpr int64_t blocks() const { return unit_blocks * row_blocks; }
};

// // Packs of 16 bytes that hold `length` elements, and zeros behind them: tensor cores take two at
// once.
WEFT_HD constexpr int64_t sequence_packs(int64_t length, int64_t element_bytes) {
  const int64_t packs = ceil_div(length * element_bytes, 16);
  return element_bytes == 2 ? packs + packs % 2 : packs;
}
// Elements from one row of shared memory to the next: an odd number of packs, so that neighbouring
// rows do not share banks.
WEFT_HD constexpr int64_t sequence_pitch(int64_t length, int64_t element_bytes) {
  return (sequence_packs(length, element_bytes) | 1) * 16 / element_bytes;
}

// Tiles of a product on tensor cores, and in how many slices their length is cut so that each warp
// has one. Slices are added up in shared memory, in their order.
WEFT_HD constexpr int64_t tensor_tiles(int64_t rows, int64_t columns) {
  return ceil_div(rows, kTensorRows) * ceil_div(columns, kTensorColumns);
}
WEFT_HD constexpr int64_t tensor_slices(int64_t rows, int64_t columns) {
  const int64_t tiles = tensor_tiles(rows, columns);
  return tiles > 0 && tiles < kSequenceWarps ? kSequenceWarps / tiles : 1;
}
// Sums that slices need besides rows * columns: with fewer tiles than warps, those of all warps.
inline constexpr int64_t kSliceSums = kSequenceWarps * kTensorRows * kTensorColumns;

// One product of a step: `columns` rows of weights a block, and the length of each.
struct SequenceProduct {
  int64_t columns = 0;
  int64_t length = 0;
};
struct SequenceProducts {
  SequenceProduct first, second;  // the second: U_n (r h), or the projection; elsewhere nothing
};

WEFT_HD constexpr SequenceProducts forward_products(const LayerProblem& p, int64_t units,
                                                    int64_t states) {
  const bool before = p.cell == LayerCell::gru_reset_before;
  SequenceProducts products = {{(before ? 2 : p.gates()) * units, p.state()}, {}};
  if (p.has_inner()) products.second = {states, p.hidden};
  return products;
}

// Shared memory of the forward kernel but for `staged_rows`, each of which takes `row_bytes`.
constexpr int64_t forward_shared_bytes(const LayerProblem& p, const SequencePlan& plan,
                                       int64_t& row_bytes) {
  const int64_t size = size_of(p.dtype), wide = std::max<int64_t>(size, 4);
  const auto piece = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const SequenceProducts products = forward_products(p, plan.units, plan.states);
  const auto [first, second] = products;
  const int64_t pitch = sequence_pitch(first.length, size),
                second_pitch = sequence_pitch(second.length, size);
  row_bytes = std::max(pitch, second_pitch) * size + std::max(first.columns, second.columns) * wide;
  return piece(first.columns * pitch * size) + piece(second.columns * second_pitch * size) +
         piece(plan.rows * plan.units * p.gates() * wide) +  // sums of W_ih x
         (p.has_cell() ? piece(plan.rows * plan.units * size) : 0) +
         piece(plan.rows * plan.states * size) +    // c, h
         piece(2 * plan.rows * p.gates() * wide) +  // moments of the rows
         piece(plan.units * p.gates() * wide) +     // scales
         piece(plan.units * 11 * wide) +            // biases, peepholes
         2 * 16;                                    // staged rows and their sums: alignment
}

// Backward products have the weights transposed: of the gradients of the sums, and before them of
// those of U_n (r h) or of the projected state.
WEFT_HD constexpr SequenceProducts backward_products(const LayerProblem& p, int64_t units,
                                                     int64_t states) {
  const bool before = p.cell == LayerCell::gru_reset_before;
  SequenceProducts products = {{states, (before ? 2 : p.gates()) * p.hidden}, {}};
  if (p.has_inner()) products.second = {units, before ? p.hidden : p.projection};
  return products;
}

constexpr int64_t backward_shared_bytes(const LayerProblem& p, const SequencePlan& plan,
                                        int64_t& row_bytes) {
  const int64_t size = size_of(p.dtype), wide = std::max<int64_t>(size, 4);
  const auto piece = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
  const auto [first, second] = backward_products(p, plan.units, plan.states);
  const int64_t pitch = sequence_pitch(first.length, size),
                second_pitch = sequence_pitch(second.length, size);
  row_bytes = std::max(pitch, second_pitch) * size + std::max(first.columns, second.columns) * wide;
  return piece(first.columns * pitch * size) + piece(second.columns * second_pitch * size) +
         piece(4 * plan.rows * p.gates() * wide) +    // moments of the rows
         piece(plan.units * p.gates() * wide) +       // scales
         2 * piece(plan.rows * plan.states * wide) +  // gradients of h, and the direct part
         (p.has_cell() ? piece(plan.rows * plan.units * wide) : 0) +
         (p.has_peephole() ? piece(3 * plan.rows * plan.units * wide) : 0) +
         2 * 16;  // staged rows and their sums: alignment
}

// In thousands of some time: how long a step takes, for comparison alone.
constexpr int64_t sequence_cost(const LayerProblem& p, const SequencePlan& plan,
                                const SequenceProducts& products) {
  constexpr int64_t kMeeting = 1500, kTile = 64, kWarpBytes = 32 * 16, kTensorStep = 48;
  const auto cost = [&](const SequenceProduct& product) {
    if (product.columns == 0) return int64_t{0};
    const int64_t bytes = product.length * size_of(p.dtype);
    const int64_t moved = plan.rows * bytes / 64 + (plan.unit_blocks > 1 ? kMeeting : 0);
    if (plan.tensor_cores) {
      const int64_t slices = tensor_slices(plan.rows, product.columns);
      return ceil_div(tensor_tiles(plan.rows, product.columns) * slices, kSequenceWarps) *
                 ceil_div(product.length, 16 * slices) * kTensorStep +
             moved;
    }
    const int64_t tiles =
        ceil_div(plan.rows, kSequenceTile) * ceil_div(product.columns, kSequenceTile);
    return ceil_div(tiles, kSequenceWarps) * ceil_div(bytes, kWarpBytes) * kTile + moved;
  };
  return cost(products.first) + cost(products.second);
}

// The plan of at most `across` by `down` blocks, or none where that does not fit; `shared_of` is as
// forward_shared_bytes. Rows that are normalised wait for other blocks with all their sums, so they
// are staged at once.
template <class Products, class Shared>
constexpr SequencePlan sequence_cut(const LayerProblem& p, bool normalised, const GridFacts& facts,
                                    int64_t across, int64_t down, const Products& products_of,
                                    const Shared& shared_of) {
  constexpr int64_t kLeastTensorRows = 8;
  SequencePlan plan;
  plan.rows = ceil_div(p.batch, down), plan.row_blocks = ceil_div(p.batch, plan.rows);
  plan.units = ceil_div(p.hidden, std::min(across, p.hidden));
  plan.unit_blocks = ceil_div(p.hidden, plan.units);
  plan.states = p.projection > 0 ? ceil_div(p.projection, plan.unit_blocks) : plan.units;
  plan.tensor_cores = size_of(p.dtype) == 2 && plan.rows >= kLeastTensorRows;
  int64_t row_bytes = 0;
  const int64_t fixed = shared_of(p, plan, row_bytes) + (plan.tensor_cores ? kSliceSums * 4 : 0);
  const int64_t fit = (facts.block_shared_bytes - fixed) / row_bytes;
  plan.staged_rows = fit >= plan.rows ? plan.rows : fit / kSequenceTile * kSequenceTile;
  if (plan.staged_rows <= 0 || (normalised && plan.staged_rows < plan.rows)) return {};
  plan.shared_bytes = fixed + plan.staged_rows * row_bytes;
  const SequenceProducts products = products_of(p, plan.units, plan.states);
  const int64_t tiles =
      ceil_div(plan.staged_rows, kSequenceTile) *
      ceil_div(std::max(products.first.columns, products.second.columns), kSequenceTile);
  plan.threads = static_cast<int>(
      32 * (plan.tensor_cores ? kSequenceWarps : std::min<int64_t>(tiles, kSequenceWarps)));
  if (plan.blocks() > facts.resident_blocks(plan.threads, plan.shared_bytes)) return {};
  return plan;
}

// The cheapest of all cuts of the batch, with the units over as many blocks as there are, or all in
// one, which meets nobody.
template <class Products, class Shared>
constexpr SequencePlan cheapest_sequence(const LayerProblem& p, bool normalised,
                                         const GridFacts& facts, const Products& products_of,
                                         const Shared& shared_of) {
  SequencePlan best;
  if (p.steps < 2 || p.units() == 0 || p.dual) return best;
  int64_t best_cost = 0;
  const int64_t most = std::min(facts.multiprocessors, kSequenceFlags);
  for (int64_t down = 1; down <= std::min(ceil_div(p.batch, kSequenceTile), most); ++down) {
    for (const int64_t across : {most / down, int64_t{1}}) {
      const SequencePlan plan =
          sequence_cut(p, normalised, facts, across, down, products_of, shared_of);
      if (!plan.persistent()) continue;
      const int64_t cost = sequence_cost(p, plan, products_of(p, plan.units, plan.states));
      if (best.persistent() && cost >= best_cost) continue;
      best = plan, best_cost = cost;
    }
  }
  return best;
}

constexpr SequencePlan forward_sequence(const LayerProblem& p, bool normalised,
                                        const GridFacts& facts) {
  const auto products = [](const LayerProblem& of, int64_t units, int64_t states) {
    return forward_products(of, units, states);
  };
  return cheapest_sequence(p, normalised, facts, products, forward_shared_bytes);
}

constexpr SequencePlan backward_sequence(const LayerProblem& p, bool normalised,
                                         const GridFacts& facts) {
  const auto products = [](const LayerProblem& of, int64_t units, int64_t states) {
    return backward_products(of, units, states);
  };
  return cheapest_sequence(p, normalised, facts, products, backward_shared_bytes);
}

}  // namespace weft
