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

struct SequencePlan {
  int64_t unit_blocks = 0;  // zero: a kernel a step
  int64_t row_blocks = 0;
  int64_t units = 0;         // of a block
  int64_t states = 0;        // of a block, of S: its units, or its share of the projection
  int64_t rows = 0;          // of a block
  int64_t staged_rows = 0;   // whose states are in shared memory at once
  int64_t shared_bytes = 0;  // of a block
  int threads = 0;

  constexpr bool persistent() const { return unit_blocks > 0; }
  constexpr int64_t blocks() const { return unit_blocks * row_blocks; }
};

// Elements from one row of shared memory to the next: whole 16-byte packs, an odd number of them,
// so that neighbouring rows do not share banks.
WEFT_HD constexpr int64_t sequence_pitch(int64_t length, int64_t element_bytes) {
  const int64_t packs = ceil_div(length * element_bytes, 16);
  return (packs | 1) * 16 / element_bytes;
}

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
         piece(plan.rows * plan.units * size) + piece(plan.rows * plan.states * size) +  // c, h
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
         piece(plan.rows * plan.units * wide) + piece(3 * plan.rows * plan.units * wide) +
         2 * 16;  // staged rows and their sums: alignment
}

// In thousands of some time: how long a step takes, for comparison alone.
constexpr int64_t sequence_cost(const LayerProblem& p, const SequencePlan& plan,
                                const SequenceProducts& products) {
  constexpr int64_t kMeeting = 1500, kTile = 64, kWarpBytes = 32 * 16;
  const auto cost = [&](const SequenceProduct& product) {
    if (product.columns == 0) return int64_t{0};
    const int64_t tiles =
        ceil_div(plan.rows, kSequenceTile) * ceil_div(product.columns, kSequenceTile);
    const int64_t bytes = product.length * size_of(p.dtype);
    return ceil_div(tiles, kSequenceWarps) * ceil_div(bytes, kWarpBytes) * kTile +
           plan.rows * bytes / 64 + (plan.unit_blocks > 1 ? kMeeting : 0);
  };
  return cost(products.first) + cost(products.second);
}

// A plan for each way to cut; `shared` is as forward_shared_bytes. Rows that are normalised wait
// for other blocks with all their sums, so they are staged at once.
template <class Products, class Shared>
constexpr SequencePlan cheapest_sequence(const LayerProblem& p, bool normalised,
                                         const GridFacts& facts, const Products& products_of,
                                         const Shared& shared_of) {
  SequencePlan best;
  int64_t best_cost = 0;
  if (p.steps < 2 || p.units() == 0 || p.dual) return best;
  const int64_t most = std::min(facts.multiprocessors, kSequenceFlags);
  const int64_t slices = std::min(ceil_div(p.batch, kSequenceTile), most);
  for (int64_t cut = 1; cut <= slices; ++cut) {
    SequencePlan plan;
    plan.rows = ceil_div(p.batch, cut), plan.row_blocks = ceil_div(p.batch, plan.rows);
    if (plan.row_blocks != cut) continue;
    plan.units = ceil_div(p.hidden, std::min(most / cut, p.hidden));
    plan.unit_blocks = ceil_div(p.hidden, plan.units);
    plan.states = p.projection > 0 ? ceil_div(p.projection, plan.unit_blocks) : plan.units;
    const SequenceProducts products = products_of(p, plan.units, plan.states);
    int64_t row_bytes = 0;
    const int64_t fixed = shared_of(p, plan, row_bytes);
    const int64_t fit = (facts.block_shared_bytes - fixed) / row_bytes;
    plan.staged_rows = fit >= plan.rows ? plan.rows : fit / kSequenceTile * kSequenceTile;
    if (plan.staged_rows <= 0 || (normalised && plan.staged_rows < plan.rows)) continue;
    plan.shared_bytes = fixed + plan.staged_rows * row_bytes;
    const int64_t tiles =
        ceil_div(plan.staged_rows, kSequenceTile) *
        ceil_div(std::max(products.first.columns, products.second.columns), kSequenceTile);
    plan.threads = static_cast<int>(32 * std::min<int64_t>(tiles, kSequenceWarps));
    if (plan.blocks() > facts.resident_blocks(plan.threads, plan.shared_bytes)) continue;
    const int64_t cost = sequence_cost(p, plan, products);
    if (best.persistent() && cost >= best_cost) continue;
    best = plan, best_cost = cost;
  }
  return best;
}

constexpr SequencePlan forward_sequence(const LayerProblem& p, bool normalised,
                                        const GridFacts& facts) {
  return cheapest_sequence(p, normalised, facts, forward_products, forward_shared_bytes);
}

constexpr SequencePlan backward_sequence(const LayerProblem& p, bool normalised,
                                         const GridFacts& facts) {
  return cheapest_sequence(p, normalised, facts, backward_products, backward_shared_bytes);
}

}  // namespace weft
