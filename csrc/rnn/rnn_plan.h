// How a recurrent layer or cell runs, and what that costs: pure functions of the problem, so that
// they can be tested and explained without running anything.
#pragma once

#include "core/window.h"
#include "rnn/mdlstm.h"
#include "rnn/rnn.h"
#include "rnn/rnn_layer.h"

namespace weft {

// Work that is worth a thread of the CPU: multiply-adds of a grid's diagonal; of a cell's product;
// units.
inline constexpr int64_t kDiagonalGrain = 1 << 18;
inline constexpr int64_t kProductGrain = 1 << 17;
inline constexpr int64_t kElementGrain = 1 << 13;

// Multiply-adds of the state's product in a step.
constexpr int64_t layer_step_products(const LayerProblem& p) {
  return p.batch * p.gates() * p.hidden * p.state();
}
// How the CPU's threads share a layer, forward and backward alike. By units: each reads its own
// part of the weights, and all meet after each step. By rows: each goes through the steps on its
// own and reads all weights, so only where those stay in its second-level cache and its rows fill a
// tile.
struct LayerSplit {
  int64_t threads;  // the most that it pays
  bool by_rows;
};
inline constexpr int64_t kOwnRows = 6, kOwnWeightBytes = 1 << 19;
inline constexpr int64_t kGateProducts = 200;  // that a unit's gates cost as much as
inline constexpr int64_t kSequenceGrain = 1 << 20;
inline constexpr int64_t kRowsOfWeights = 4;  // whose products cost what loading weights does
inline constexpr int64_t kMeeting = 1 << 15;  // multiply-adds that a thread's meeting others costs

// How many threads share `work` multiply-adds between meetings, which cost the more the more meet:
// another one as long as it spares more than it costs.
constexpr int64_t meeting_threads(int64_t work, int64_t available) {
  int64_t threads = 1;
  while (threads < available && threads * (threads + 1) <= work / kMeeting) ++threads;
  return threads;
}

// Of at most `available` threads.
constexpr LayerSplit layer_split(const LayerProblem& p, int64_t available) {
  const int64_t products = layer_step_products(p);
  const int64_t weights = (p.gates() * p.state() + p.projection) * p.hidden;
  const auto at_most = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t loads = p.batch > 0 ? products / p.batch * kRowsOfWeights : 0;
  const int64_t gates = kGateProducts * p.units();
  const int64_t step = (products > loads ? products : loads) + gates;
  const int64_t by_units =
      at_most(meeting_threads(step, available), p.steps * step / kSequenceGrain);
  const int64_t by_rows =
      weights * (p.dtype == DType::f64 ? 8 : 4) > kOwnWeightBytes
          ? 0
          : at_most(available,
                    at_most(p.batch / kOwnRows, p.steps * (products + gates) / kSequenceGrain));
  return by_rows > 1 && by_rows >= by_units ? LayerSplit{by_rows, true}
                                            : LayerSplit{by_units, false};
}
// The same of a grid's longest anti-diagonal.
constexpr int64_t grid_threads(const GridProblem& p) {
  const int64_t sites = p.height < p.width ? p.height : p.width;
  return sites * p.batch * 2 * kGridGates * p.hidden * p.hidden / kDiagonalGrain;
}
// Hidden units of a cell's product that are worth a thread.
constexpr int64_t cell_grain(const CellProblem& p, int64_t gates) {
  return ceil_div(kProductGrain, p.batch * gates * (p.input + p.hidden));
}

// ---- costs -------------------------------------------------------------------------------------

struct RnnCost {
  int64_t flops;
  int64_t bytes;
  int64_t least_bytes;
};

// Operations of a unit's gates beside the products: about so many, sigmoid and tanh counted as
// four each.
inline constexpr int64_t kGateFlops = 32;

// All steps of a layer. Each reads the weights again; whether from memory or a cache is a matter
// of their size. A derivative is multiplied with the weights, and the value with theirs.
constexpr RnnCost layer_cost(const LayerProblem& p, bool keeps) {
  const int64_t products = layer_step_products(p) + p.batch * p.projection * p.hidden;
  const int64_t weights = p.gates() * p.hidden * p.state() + p.projection * p.hidden;
  const int64_t step = p.units() * p.gates() + p.states() +
                       (keeps ? p.units() * (p.kept() + (p.has_cell() ? 1 : 0)) : 0);
  const int64_t ends = 2 * (p.states() + (p.has_cell() ? p.units() : 0));
  const int64_t size = size_of(p.dtype) * (p.dual ? 2 : 1);
  const int64_t least = (p.steps * step + ends + weights) * size;
  return {p.steps * (2 * products + kGateFlops * p.units()) * (p.dual ? 3 : 1),
          least + (p.steps > 0 ? p.steps - 1 : 0) * weights * size, least};
}

constexpr RnnCost grid_cost(const GridProblem& p) {
  const int64_t units = p.height * p.width * p.batch * p.hidden;
  const int64_t weights = 2 * kGridGates * p.hidden * p.hidden;
  const int64_t size = size_of(p.dtype) * (p.dual ? 2 : 1);
  const int64_t least = (units * (2 * kGridGates + 2) + weights) * size;
  return {units * (4 * kGridGates * p.hidden + kGateFlops) * (p.dual ? 3 : 1),
          least + (p.diagonals() - 1) * weights * size, least};
}

// A cell's forward: `columns` numbers of a unit are written.
constexpr RnnCost cell_cost(const CellProblem& p, int64_t gates, int64_t columns) {
  const int64_t depth = p.input + p.hidden;
  const int64_t bytes =
      (p.batch * depth + gates * p.hidden * depth + p.units() * columns) * size_of(p.dtype);
  return {2 * p.batch * gates * p.hidden * depth + kGateFlops * p.units(), bytes, bytes};
}

// Elementwise: `columns` numbers of a unit are read or written.
constexpr RnnCost elements_cost(const CellProblem& p, int64_t columns) {
  const int64_t bytes = p.units() * columns * size_of(p.dtype);
  return {p.units() * kGateFlops, bytes, bytes};
}

// A [m, k] times B [k, n].
constexpr RnnCost product_cost(DType dtype, int64_t m, int64_t n, int64_t k) {
  const int64_t bytes = (m * k + k * n + m * n) * size_of(dtype);
  return {2 * m * n * k, bytes, bytes};
}

// ---- CUDA --------------------------------------------------------------------------------------

// The tile product of a step (cell_tile.h): a thread owns one row and unit, with all its gates.
struct CellTile {
  static constexpr int kRows = 8, kUnits = 16, kDepth = 32;
  static constexpr int kThreads = kRows * kUnits;

  static constexpr int64_t blocks(int64_t batch, int64_t units) {
    return ceil_div(batch, kRows) * ceil_div(units, kUnits);
  }
  static constexpr int64_t shared_bytes(DType dtype, int64_t gates) {
    return (kRows * kDepth + gates * kUnits * (kDepth + 1)) * (dtype == DType::f64 ? 8 : 4);
  }
};

enum class LayerPass : uint8_t { forward, backward };

// Kernels that a step launches where it is a kernel of its own.
constexpr int64_t layer_step_launches(const LayerProblem& p, LayerPass pass, bool normalised) {
  const bool resets_before = p.cell == LayerCell::gru_reset_before;
  const int64_t norms = normalised ? (resets_before ? 2 : 1) : 0;
  if (pass == LayerPass::forward) return 1 + (p.has_inner() ? 1 : 0) + 2 * norms;
  return 2 + (p.has_inner() ? 2 : 0) + norms;
}

}  // namespace weft
