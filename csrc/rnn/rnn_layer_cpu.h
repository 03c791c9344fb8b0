// What the CPU kernels of recurrent layers share: numbers of whole vectors of units, packed weights
// and their product with the rows of a state, and which rows take a step.
#pragma once

#include <type_traits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/vec_math.h"
#include "core/window.h"
#include "gemm/packed_cpu.h"
#include "rnn/rnn_layer.h"
#include "rnn/rnn_layer_cells.h"
#include "rnn/rnn_plan.h"
#include "rnn/units_cpu.h"

namespace weft::WEFT_TARGET {

// Defined in a translation unit of their own: they take as long to compile as all others.
void layer_forward_dual(const LayerProblem& p, const LayerForward& t, const Context& context);
void layer_backward_dual(const LayerProblem& p, const LayerBackward& t, const Context& context);

namespace {

constexpr int64_t kRowBlock = 48;  // rows whose sums wait for their gates

// ---- numbers -----------------------------------------------------------------------------------

template <class V>
struct VecMath {
  using Number = V;
  static constexpr bool kDual = false;
  static WEFT_INLINE V one() { return V{} + 1; }
  static WEFT_INLINE V sigmoid(V x) { return vec_sigmoid(x); }
  static WEFT_INLINE V tanh(V x) { return vec_tanh(x); }
  static WEFT_INLINE V relu(V x) { return x < V{} ? V{} : x; }  // NaN stays NaN
  static WEFT_INLINE V where_positive(V y, V x) { return y <= V{} ? V{} : x; }
};

template <class T, bool kDual>
using LayerMath = std::conditional_t<kDual, DualMath<VecMath<Vec<accumulate_t<T>>>>,
                                     VecMath<Vec<accumulate_t<T>>>>;

// Where a vector of units stands. A fresh row starts from zeros.
struct At {
  int64_t time, row, unit;
  int count;
  bool fresh = false;
};

// Units of `T` at `offset`; zeros where there is no tensor.
template <class M, class T>
WEFT_INLINE typename M::Number load_number(const Numbers& t, int64_t offset, int count) {
  const auto value = load_units_or_zero(static_cast<const T*>(t.value), offset, count);
  if constexpr (M::kDual) {
    return {value, load_units_or_zero(static_cast<const T*>(t.derivative), offset, count)};
  } else {
    return value;
  }
}

template <class M, class T>
WEFT_INLINE void store_number(const NumbersOut& t, int64_t offset, typename M::Number number,
                              int count) {
  if constexpr (M::kDual) {
    store_units(static_cast<T*>(t.value) + offset, number.value, count);
    store_units(static_cast<T*>(t.derivative) + offset, number.derivative, count);
  } else {
    store_units(static_cast<T*>(t.value) + offset, number, count);
  }
}

// `value` as memory of type T holds it. Dual numbers are never of a half type.
template <class T, class N>
WEFT_INLINE N rounded(N value) {
  if constexpr (sizeof(T) == sizeof(accumulate_t<T>)) {
    return value;
  } else {
    return round_to<T>(value);
  }
}
// store_number of what `rounded` gives.
template <class M, class T>
WEFT_INLINE void store_rounded(const NumbersOut& t, int64_t offset, typename M::Number number,
                               int count) {
  if constexpr (std::is_same_v<T, bf16>) {
    bf16* at = static_cast<bf16*>(t.value) + offset;
    if (count == kLanes<T>) [[likely]]
      return store_exact(at, number);
    store_part(at, number, count);
  } else {
    store_number<M, T>(t, offset, number, count);
  }
}

// The part of a tensor that begins `offset` elements on.
template <class T>
Numbers part(const Numbers& t, int64_t offset) {
  const auto shift = [&](const void* from) {
    return from ? static_cast<const T*>(from) + offset : nullptr;
  };
  return {shift(t.value), shift(t.derivative)};
}

template <class T>
NumbersOut shifted(const NumbersOut& t, int64_t offset) {
  const auto shift = [&](void* from) { return from ? static_cast<T*>(from) + offset : nullptr; };
  return {shift(t.value), shift(t.derivative)};
}

// Work memory for `count` numbers.
template <class Acc>
class Work {
 public:
  Work(int64_t count, bool dual) : memory_(dual ? 2 * count : count) {
    at_.value = memory_.data();
    if (dual) at_.derivative = memory_.data() + count;
  }
  const NumbersOut& at() const { return at_; }
  NumbersOut at(int64_t offset) const { return shifted<Acc>(at_, offset); }

 private:
  Scratch<Acc> memory_;
  NumbersOut at_;
};

// Copies `count` elements and their derivatives; none read as zeros.
template <class From, class To>
void copy_numbers(const Numbers& from, int64_t count, const NumbersOut& to) {
  const auto copy = [&](const void* source, void* target) {
    for (int64_t i = 0; target && i < count; ++i)
      static_cast<To*>(target)[i] =
          source ? narrow<To>(widen(static_cast<const From*>(source)[i])) : To{};
  };
  copy(from.value, to.value);
  copy(from.derivative, to.derivative);
}

// ---- terms -------------------------------------------------------------------------------------

// What products read is of type `Term`: the accumulation type, or bf16 itself where the processor
// multiplies pairs of it (gemm/pairs_cpu.h). Then rows begin at whole pairs, an odd one ending in a
// zero.
template <class T, class Term>
inline constexpr bool kPairs = !std::is_same_v<Term, accumulate_t<T>>;

template <class T, class Term>
WEFT_INLINE int64_t term_row(int64_t count) {
  return kPairs<T, Term> ? (count + 1) / 2 * 2 : count;
}

// Work memory for `rows` rows of `count` terms, and its numbers.
template <class T, class Term>
class Terms {
 public:
  Terms(int64_t rows, int64_t count, bool dual) : work_(rows * term_row<T, Term>(count), dual) {
    if (kPairs<T, Term> && count % 2 != 0)
      fill(static_cast<Term*>(work_.at().value), rows * term_row<T, Term>(count), Term{});
  }
  const NumbersOut& at() const { return work_.at(); }
  NumbersOut at(int64_t offset) const { return work_.at(offset); }

 private:
  Work<Term> work_;
};

// Calls `body(tag, term)` with the element type and what its products read.
template <class Body>
WEFT_INLINE void dispatch_terms(DType dtype, const Body& body) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
      if (has_pairs()) return body(tag, tag);
#endif
    body(tag, TypeTag<accumulate_t<T>>{});
  });
}

// ---- masks -------------------------------------------------------------------------------------

// A thread's rows at a step: `fed` ones, whose state goes into the product; those that start
// afresh, up to `active`; those that do not take it, up to `count`.
struct Rows {
  int64_t first, count;
  Scratch<int64_t> order;
  int64_t fed = 0, active = 0;

  Rows(int64_t begin, int64_t end) : first(begin), count(end - begin), order(end - begin) {}
  // Where work memory holds what belongs to the row at `place` of `order`.
  int64_t slot(const int64_t* place) const { return first + (place - order.data()); }
  void at_time(int64_t time, int64_t batch, const LayerMasks& masks) {
    const bool* resets = masks.resets ? masks.resets + time * batch : nullptr;
    const auto ended = [&](int64_t row) { return masks.lengths && time >= masks.lengths[row]; };
    const auto fresh = [&](int64_t row) { return resets && resets[row]; };
    const int64_t end = first + count;
    int64_t found = 0;
    for (int64_t row = first; row < end; ++row)
      if (!ended(row) && !fresh(row)) order[found++] = row;
    fed = found;
    for (int64_t row = first; resets && row < end; ++row)
      if (!ended(row) && fresh(row)) order[found++] = row;
    active = found;
    for (int64_t row = first; found < count; ++row)
      if (ended(row)) order[found++] = row;
  }
};

// How much of the old state a step keeps: an element of a mask [T, B, width], or the same for all.
template <class T>
WEFT_INLINE Vec<accumulate_t<T>> zone(const LayerProblem& p, const void* mask, int64_t width,
                                      const At& at) {
  using V = Vec<accumulate_t<T>>;
  if (mask == nullptr) return V{} + static_cast<accumulate_t<T>>(p.zoneout);
  return load_units(static_cast<const T*>(mask) + (at.time * p.batch + at.row) * width + at.unit,
                    at.count);
}

// Calls `body(at)` for each vector of units [begin, end) of a row.
template <class T, class Body>
WEFT_INLINE void each_vector(int64_t time, int64_t row, bool fresh, int64_t begin, int64_t end,
                             const Body& body) {
  for (int64_t unit = begin; unit < end; unit += kLanes<T>) {
    const int64_t left = end - unit;
    body(At{time, row, unit, static_cast<int>(left < kLanes<T> ? left : kLanes<T>), fresh});
  }
}

// A thread's part of a product's units: whole panels.
struct Part {
  int64_t begin, end;  // panels
  int64_t first_unit, last_unit;

  template <class P>
  static Part of(const Team& team, const P& w) {
    const int64_t begin = team.begin(w.count()), end = team.end(w.count());
    const int64_t width = P::kGroups * P::kLane, last = end * width;
    return {begin, end, begin * width, last < w.units() ? last : w.units()};
  }
};

// ---- products ----------------------------------------------------------------------------------

// Element (k, gate, unit) of a matrix of weights.
struct WeightLayout {
  int64_t units, k, k_stride, gate_stride, unit_stride;
};

// Weights in panels of kVectors vectors: kGates of each vector of units, side by side.
template <class T, class Term_, int kVectors_, int kGates_>
class Panels {
 public:
  using Acc = accumulate_t<T>;
  using Term = Term_;
  static constexpr bool kPairs = weft::WEFT_TARGET::kPairs<T, Term>;
  static constexpr int kVectors = kVectors_, kGates = kGates_, kGroups = kVectors / kGates;
  static constexpr int64_t kLane = kLanes<T>, kWidth = kVectors * kLane;

  Panels(const WeightLayout& layout, const void* weights)
      : layout_(layout),
        weights_(static_cast<const T*>(weights)),
        count_(ceil_div(layout.units, kGroups * kLane)),
        packed_(weights ? count_ * kWidth * k() : 0) {}

  int64_t count() const { return count_; }
  int64_t units() const { return layout_.units; }
  // Numbers or words of a row.
  int64_t k() const { return term_row<T, Term>(layout_.k) / (kPairs ? 2 : 1); }
  explicit operator bool() const { return weights_ != nullptr; }
  const Acc* operator[](int64_t panel) const { return packed_.data() + panel * kWidth * k(); }

  void pack(int64_t begin, int64_t end) {
    if (weights_ == nullptr) return;
    for (int64_t i = begin * kVectors; i < end * kVectors; ++i) {
      const int64_t vector = i % kVectors;
      const int64_t unit = (i / kVectors * kGroups + vector / kGates) * kLane;
      const T* from = weights_ + vector % kGates * layout_.gate_stride + unit * layout_.unit_stride;
      Acc* to = packed_.data() + i / kVectors * kWidth * k() + vector * kLane;
      if constexpr (kPairs) {
        pack_pairs(from, layout_.k_stride, layout_.unit_stride, units() - unit, layout_.k, kVectors,
                   to);
      } else {
        pack_vector(from, layout_.k_stride, layout_.unit_stride, units() - unit, layout_.k,
                    kVectors, to);
      }
    }
  }

 private:
  WeightLayout layout_;
  const T* weights_;
  int64_t count_;
  Scratch<Acc> packed_;
};

// A member's share of packing; its own panels, where the members share rows.
template <class P>
void pack_part(const Team& team, P& w) {
  w.pack(team.begin(w.count()), team.end(w.count()));
}

// Sums of some rows at one vector of units; none read as zeros.
template <class Acc>
struct RowSums {
  Numbers from;
  int64_t row = 0, gate = 0;  // elements from one to the next

  template <class M>
  WEFT_INLINE typename M::Number get(int64_t i, int64_t g, int count) const {
    return load_number<M, Acc>(from, i * row + g * gate, count);
  }
};

// Calls `body(rows, row_count, unit, count, sums)` for some of the rows and each vector of units of
// the panels [begin, end); `sums` are the products of those rows of `from` [B, k], which are
// `stride` apart, with the weights. `soon(row, unit)` is called before the product is made.
template <class M, class P, class Soon, class Body>
WEFT_INLINE void multiply(const P& w, const P& w_derivative, const Numbers& from, int64_t stride,
                          const int64_t* rows, int64_t row_count, int64_t begin, int64_t end,
                          const Soon& soon, const Body& body) {
  using Acc = typename P::Acc;
  using Term = typename P::Term;
  constexpr int kPlanes = M::kDual ? 2 : 1;
  alignas(kVectorBytes) Acc sums[kPlanes][kRowBlock * P::kWidth];
  const int64_t k = w.k();
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t first = 0; first < row_count; first += kRowBlock) {
      const int64_t left = row_count - first, count = left < kRowBlock ? left : kRowBlock;
      const Acc* source[kPlanes][kRowBlock];
      Acc* target[kPlanes][kRowBlock];
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t g = 0; g < P::kGroups; ++g) {
          const int64_t unit = (panel * P::kGroups + g) * P::kLane;
          if (unit < w.units()) soon(rows[first + i], unit);
        }
        const int64_t offset = rows[first + i] * stride;
        source[0][i] = reinterpret_cast<const Acc*>(static_cast<const Term*>(from.value) + offset);
        target[0][i] = sums[0] + i * P::kWidth;
        if constexpr (M::kDual) {
          source[1][i] = static_cast<const Acc*>(from.derivative) + offset;
          target[1][i] = sums[1] + i * P::kWidth;
        }
      }
      packed_rows<P::kVectors, P::kPairs>(source[0], count, w[panel], k, false, target[0]);
      if constexpr (M::kDual) {
        packed_rows<P::kVectors>(source[1], count, w[panel], k, false, target[1]);
        if (w_derivative)
          packed_rows<P::kVectors>(source[0], count, w_derivative[panel], k, true, target[1]);
      }
      for (int64_t g = 0; g < P::kGroups; ++g) {
        const int64_t unit = (panel * P::kGroups + g) * P::kLane, rest = w.units() - unit;
        if (rest <= 0) break;
        Numbers found = {sums[0] + g * P::kGates * P::kLane, nullptr};
        if constexpr (M::kDual) found.derivative = sums[1] + g * P::kGates * P::kLane;
        body(rows + first, count, unit, static_cast<int>(rest < P::kLane ? rest : P::kLane),
             RowSums<Acc>{found, P::kWidth, P::kLane});
      }
    }
  }
}

constexpr auto kNotSoon = [](int64_t, int64_t) {};

// A body of `multiply` that calls `body(at, product)` row by row, of a single gate.
template <class M, class Acc, class Body>
WEFT_INLINE auto each_row(int64_t time, const Body& body) {
  return [time, &body](const int64_t* rows, int64_t row_count, int64_t unit, int count,
                       const RowSums<Acc>& found) __attribute__((always_inline)) {
    for (int64_t i = 0; i < row_count; ++i)
      body(At{time, rows[i], unit, count}, found.template get<M>(i, 0, count));
  };
}

}  // namespace
}  // namespace weft::WEFT_TARGET
