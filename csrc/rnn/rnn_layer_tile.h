// What the CUDA kernels of recurrent layers share: numbers of either kind, one step's masks, and
// the product of a state with weights by the tiles of cell_tile.h. For .cu files alone.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/window.h"
#include "device/device.h"
#include "rnn/cell_tile.h"
#include "rnn/rnn_layer.h"
#include "rnn/rnn_layer_cells.h"

namespace weft::WEFT_TARGET {

void layer_forward(const LayerProblem& p, const LayerForward& t, const Context& context);
void layer_backward(const LayerProblem& p, const LayerBackward& t, const Context& context);
// All steps in one kernel; false, and nothing done, where no plan fits.
bool sequence_forward(const LayerProblem& p, const LayerForward& t, const Context& context);
bool sequence_backward(const LayerProblem& p, const LayerBackward& t, const Context& context);
void normalise_rows(const LayerProblem& p, const NormForward& t, const Context& context);
void normalise_rows_backward(const LayerProblem& p, const NormBackward& t, const Context& context);

namespace {

constexpr int kElementThreads = 256;

// ---- numbers -----------------------------------------------------------------------------------

template <class V>
struct ScalarMath {
  using Number = V;
  static constexpr bool kDual = false;
  static WEFT_DEVICE V one() { return V{1}; }
  static WEFT_DEVICE V sigmoid(V x) { return V{1} / (V{1} + std::exp(-x)); }
  static WEFT_DEVICE V tanh(V x) { return std::tanh(x); }
  static WEFT_DEVICE V relu(V x) { return x < V{0} ? V{0} : x; }  // NaN stays NaN
  static WEFT_DEVICE V where_positive(V y, V x) { return y <= V{0} ? V{0} : x; }
};

template <class T, bool kDual>
using LayerMath =
    std::conditional_t<kDual, DualMath<ScalarMath<accumulate_t<T>>>, ScalarMath<accumulate_t<T>>>;

// Zero where there is no tensor.
template <class T>
WEFT_DEVICE accumulate_t<T> load_or_zero(const void* address, int64_t offset) {
  return address ? widen(load(static_cast<const T*>(address) + offset)) : accumulate_t<T>{0};
}
template <class M, class T>
WEFT_DEVICE typename M::Number load_number(const Numbers& t, int64_t offset) {
  if constexpr (M::kDual) {
    return {load_or_zero<T>(t.value, offset), load_or_zero<T>(t.derivative, offset)};
  } else {
    return load_or_zero<T>(t.value, offset);
  }
}
template <class M, class T>
WEFT_DEVICE void store_number(T* value, T* derivative, int64_t offset, typename M::Number number) {
  if constexpr (M::kDual) {
    store(value + offset, narrow<T>(number.value));
    store(derivative + offset, narrow<T>(number.derivative));
  } else {
    store(value + offset, narrow<T>(number));
  }
}

// The part of a tensor that begins `offset` elements on.
template <class T>
WEFT_HD Numbers part(const Numbers& t, int64_t offset) {
  const auto shift = [&](const void* from) {
    return from ? static_cast<const T*>(from) + offset : nullptr;
  };
  return {shift(t.value), shift(t.derivative)};
}
template <class T>
WEFT_HD NumbersOut part(const NumbersOut& t, int64_t offset) {
  const auto shift = [&](void* from) { return from ? static_cast<T*>(from) + offset : nullptr; };
  return {shift(t.value), shift(t.derivative)};
}
template <class T>
WEFT_HD T* shifted(void* from, int64_t offset) {
  return from ? static_cast<T*>(from) + offset : nullptr;
}

// The masks of one step: `resets` and the zones begin at it.
template <class T>
WEFT_HD LayerMasks masks_at(const LayerProblem& p, const LayerMasks& masks, int64_t time) {
  LayerMasks at = masks;
  if (at.resets) at.resets += time * p.batch;
  const auto zone = [&](const void* mask, int64_t elements) {
    return mask ? static_cast<const T*>(mask) + time * elements : nullptr;
  };
  at.zone_h = zone(masks.zone_h, p.states()), at.zone_c = zone(masks.zone_c, p.units());
  return at;
}
template <class T>
WEFT_DEVICE accumulate_t<T> zone(const LayerProblem& p, const void* mask, int64_t element) {
  return mask ? load_or_zero<T>(mask, element) : static_cast<accumulate_t<T>>(p.zoneout);
}

// ---- products ----------------------------------------------------------------------------------

// The product of one plane of a state [B, k] with kGates rows of weights [kGates * H, k] a unit.
template <int kGates, class T, class Acc>
WEFT_DEVICE void state_product(const CellProblem& p, const Place& at, int64_t k, const void* h,
                               const void* dropout, const void* w, Acc* a_tile, Acc* w_tile,
                               Acc (&sum)[kSums]) {
  const auto* state = static_cast<const T*>(h);
  const auto* weights = static_cast<const T*>(w);
  for (int64_t first = 0; first < k; first += kDepth) {
    for (int i = device::thread_index(); i < kRows * kDepth; i += kCellThreads) {
      const int64_t row = at.first_row + i / kDepth, column = first + i % kDepth;
      const bool inside = row < p.batch && column < k;
      a_tile[i] = inside ? widen(load(state + row * k + column)) : Acc{0};
      if (inside && dropout) a_tile[i] *= load_or_zero<T>(dropout, row * k + column);
    }
    for (int i = device::thread_index(); i < kGates * kUnits * kDepth; i += kCellThreads) {
      const int line = i / kDepth;
      const int64_t unit = at.first_unit + line % kUnits, column = first + i % kDepth;
      const int64_t row = line / kUnits * p.hidden + unit;
      w_tile[line * (kDepth + 1) + i % kDepth] =
          unit < p.hidden && column < k ? widen(load(weights + row * k + column)) : Acc{0};
    }
    device::barrier();
    const int depth = k - first < kDepth ? static_cast<int>(k - first) : kDepth;
    for (int i = 0; i < depth; ++i) {
      const Acc value = a_tile[at.local_row * kDepth + i];
      for (int g = 0; g < kGates; ++g)
        sum[g] += value * w_tile[(g * kUnits + at.local_unit) * (kDepth + 1) + i];
    }
    device::barrier();
  }
}

// All planes of it; sums begin at zero.
template <int kGates, class M, class T>
WEFT_DEVICE void number_product(const CellProblem& p, const Place& at, int64_t k, const Numbers& h,
                                const void* dropout, const Numbers& w,
                                typename M::Number (&sums)[kSums]) {
  using Acc = accumulate_t<T>;
  device::SharedMemory shared;
  Acc* a_tile = shared.take<Acc>(kRows * kDepth);
  Acc* w_tile = shared.take<Acc>(kGates * kUnits * (kDepth + 1));
  Acc sum[kSums] = {};
  state_product<kGates, T>(p, at, k, h.value, dropout, w.value, a_tile, w_tile, sum);
  if constexpr (M::kDual) {
    Acc derivative[kSums] = {};
    if (h.derivative)
      state_product<kGates, T>(p, at, k, h.derivative, dropout, w.value, a_tile, w_tile,
                               derivative);
    if (w.derivative)
      state_product<kGates, T>(p, at, k, h.value, dropout, w.derivative, a_tile, w_tile,
                               derivative);
    for (int g = 0; g < kGates; ++g) sums[g] = {sum[g], derivative[g]};
  } else {
    for (int g = 0; g < kGates; ++g) sums[g] = sum[g];
  }
}

template <class T>
int64_t product_bytes(int gates) {
  return (kRows * kDepth + gates * kUnits * (kDepth + 1)) * sizeof(accumulate_t<T>);
}

inline CellProblem tiles(const LayerProblem& p, int64_t units) {
  CellProblem tile;
  tile.dtype = p.dtype, tile.batch = p.batch, tile.hidden = units;
  return tile;
}
inline int64_t tile_blocks(const CellProblem& tile) {
  return ceil_div(tile.batch, kRows) * ceil_div(tile.hidden, kUnits);
}

// ---- dispatch ----------------------------------------------------------------------------------

// Calls `body` with the element type and whether numbers are dual.
template <class Body>
void dispatch_numbers(const LayerProblem& p, const Body& body) {
  if (p.dual) {
    if (p.dtype == DType::f64) return body(TypeTag<double>{}, std::true_type{});
    return body(TypeTag<float>{}, std::true_type{});
  }
  dispatch_dtype(p.dtype, [&](auto tag) { body(tag, std::false_type{}); });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
