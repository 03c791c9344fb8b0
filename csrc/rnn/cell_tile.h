// The tile product of a recurrent step on CUDA: a block owns kRows batch rows by kUnits hidden
// units, a thread one of each, with its sums in registers. For .cu files alone.
#pragma once

#include <cmath>

#include "core/window.h"
#include "device/device.h"
#include "rnn/cell_math.h"
#include "rnn/rnn.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kRows = 8;
constexpr int kUnits = 16;
constexpr int kDepth = 32;
constexpr int kCellThreads = kRows * kUnits;
constexpr int kSums = 4;

template <class V>
WEFT_DEVICE V sigmoid(V x) {
  return V{1} / (V{1} + std::exp(-x));
}

// A cell: `kGates` rows of weights a unit; which of the four sums each adds to in the two products.
struct Lstm {
  static constexpr int kGates = 4;
  static WEFT_HD constexpr int input_column(int gate) { return gate; }
  static WEFT_HD constexpr int hidden_column(int gate) { return gate; }
};
struct Gru {
  static constexpr int kGates = 3;
  static WEFT_HD constexpr int input_column(int gate) { return gate; }
  static WEFT_HD constexpr int hidden_column(int gate) { return gate == 2 ? 3 : gate; }
};

template <bool kRelu>
struct Elman {
  static constexpr int kGates = 1;
  static WEFT_HD constexpr int input_column(int) { return 0; }
  static WEFT_HD constexpr int hidden_column(int) { return 0; }
};

// Where a thread stands: its row and unit, and its block's first.
struct Place {
  int64_t row, unit, first_row, first_unit;
  int local_row, local_unit;
  bool inside;
};

WEFT_DEVICE Place place_of_thread(const CellProblem& p) {
  const int64_t across = ceil_div(p.hidden, kUnits);
  Place at;
  at.local_row = device::thread_index() / kUnits;
  at.local_unit = device::thread_index() % kUnits;
  at.first_row = device::block_index() / across * kRows;
  at.first_unit = device::block_index() % across * kUnits;
  at.row = at.first_row + at.local_row;
  at.unit = at.first_unit + at.local_unit;
  at.inside = at.row < p.batch && at.unit < p.hidden;
  return at;
}

// sum[column(g)] += row of `a` [B, k] times gate g's row of `w` [kGates * H, k].
template <class Cell, bool kHidden, class T, class Acc>
WEFT_DEVICE void add_product(const CellProblem& p, const Place& at, const T* a, const T* w,
                             int64_t k, Acc* a_tile, Acc* w_tile, Acc (&sum)[kSums]) {
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      a_tile[i] = row < p.batch && column < k ? widen(load(a + row * k + column)) : Acc{0};
    }
    for (int i = device::thread_index(); i < Cell::kGates * kUnits * kDepth; i += kCellThreads) {
      const int line = i / kDepth;
      const int64_t unit = at.first_unit + line % kUnits, column = first + i % kDepth;
      const int64_t row = line / kUnits * p.hidden + unit;
      w_tile[line * (kDepth + 1) + i % kDepth] =
          unit < p.hidden && column < k ? widen(load(w + row * k + column)) : Acc{0};
    }
    device::barrier();
    const int depth = k - first < kDepth ? static_cast<int>(k - first) : kDepth;
    for (int i = 0; i < depth; ++i) {
      const Acc value = a_tile[at.local_row * kDepth + i];
      for (int g = 0; g < Cell::kGates; ++g)
        sum[kHidden ? Cell::hidden_column(g) : Cell::input_column(g)] +=
            value * w_tile[(g * kUnits + at.local_unit) * (kDepth + 1) + i];
    }
    device::barrier();
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
