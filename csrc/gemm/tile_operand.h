// Where the tiles of a product come from: addresses as the sum of a row's part and a place's part.
//
// A product is C[row, column] = Σ_k A[row, k] · B[column, k]; "row" below is a row of A or a column
// of C, and k a place of the reduction. Either index is taken apart into digits (outer, d, h, w,
// inner; the last fastest), each with its step in memory, and, for operands that are windows on a
// map, each of d, h, w with its step in positions. Offsets and positions of the row and of k add up
// to those of the element: im2col is this addition, never a matrix. Elements whose position falls
// outside the map, and indices past the end, are zeros that are not read.
#pragma once

#include <cstdint>
#include <limits>

#include "device/device.h"

namespace weft::WEFT_TARGET {
namespace {

// Division of numbers below 2^31 by one that the host knows: a product and a shift.
class WideDivider {
 public:
  WideDivider() = default;
  explicit WideDivider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)), shift_(31) {
    while ((int64_t{1} << (shift_ - 31)) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }

  // The quotient; `index` becomes the remainder.
  WEFT_HD int split(int& index) const {
    const auto quotient = static_cast<uint32_t>((static_cast<uint64_t>(index) * factor_) >> shift_);
    index -= static_cast<int>(quotient * divisor_);
    return static_cast<int>(quotient);
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t factor_ = 1u << 31;
  uint32_t shift_ = 31;
};

// A row or a place of the reduction: what it adds to the offset and to the position of an element.
struct Spot {
  int64_t offset;
  int d, h, w;
};

// Added to a position, it stays outside of every map; twice, too.
constexpr int kOutside = -(1 << 30);

struct IndexMap {
  int count = 0;
  WideDivider by_d, by_h, by_w, by_inner;
  int64_t offset = 0;  // of index 0
  int64_t outer_step = 0, d_step = 0, h_step = 0, w_step = 0, inner_step = 0;
  int from[3] = {};  // the position of digits 0
  int step[3] = {};

  // Without kBounded positions do not count: `d` only tells whether `index` is past the end.
  template <bool kBounded>
  WEFT_HD Spot spot(int index) const {
    if (index >= count) return {offset, kOutside, kOutside, kOutside};
    int inner = index;
    int w = by_inner.split(inner);
    int h = by_w.split(w);
    int d = by_h.split(h);
    const int outer = by_d.split(d);
    Spot s;
    s.offset =
        offset + outer * outer_step + d * d_step + h * h_step + w * w_step + inner * inner_step;
    s.d = kBounded ? from[0] + d * step[0] : 0;
    s.h = kBounded ? from[1] + h * step[1] : 0;
    s.w = kBounded ? from[2] + w * step[2] : 0;
    return s;
  }
};

// index -> index · step.
inline IndexMap linear_map(int64_t count, int64_t step) {
  IndexMap map;
  map.count = static_cast<int>(count);
  map.outer_step = step;
  return map;
}

// An operand, but for its address.
struct Operand {
  IndexMap rows;
  IndexMap reduction;
  int extent[3] = {1, 1, 1};  // of the map, where the operand is bounded
  int64_t group_step = 0;
};

// How an operand is read and how its tile lies in shared memory.
enum class Along : uint8_t { reduction, rows };

// Copies tiles of an operand to shared memory, where they lie as [row][k] or [k][row], padded so
// that fragments are read without bank conflicts. A thread copies the same k (or pack of them) of
// several rows, so one index is taken apart a tile.
//
// kPack elements lie together along `kAlong`, 16 bytes, or it is 1 and nothing need be aligned;
// pairs of bytes, which no asynchronous copy moves, then go through a register.
template <class T, int kRows, int kReduction, int kThreads, int kPack, Along kAlong, bool kBounded>
class OperandLoader {
 public:
  static constexpr Along along = kAlong;
  static constexpr bool kByReduction = kAlong == Along::reduction;
  static constexpr int kPad = sizeof(T) == 2 ? 8 : sizeof(T) == 4 && !kByReduction ? 8 : 4;
  static constexpr int kPitch = (kByReduction ? kReduction : kRows) + kPad;
  static constexpr int kElements = (kByReduction ? kRows : kReduction) * kPitch;

  WEFT_DEVICE OperandLoader(const Operand& operand, const T* base, int first_row)
      : operand_(operand), base_(base) {
    const int thread = device::thread_index();
    const int k_lane = kByReduction ? thread % kLanesK : thread / kLanesR;
    const int row_lane = kByReduction ? thread / kLanesK : thread % kLanesR;
    k_ = k_lane * (kByReduction ? kPack : 1);
    const int row = row_lane * (kByReduction ? 1 : kPack);
    place_ = kByReduction ? row * kPitch + k_ : k_ * kPitch + row;
    for (int i = 0; i < kItems; ++i)
      rows_[i] = operand.rows.template spot<kBounded>(first_row + row + i * kRowStep);
  }

  // Starts the copy of the tile whose first place of the reduction is `first`.
  WEFT_DEVICE void copy(T* tile, int first) const {
    const Spot k = operand_.reduction.template spot<kBounded>(first + k_);
    WEFT_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const Spot& row = rows_[i];
      const T* from = base_ + (row.offset + k.offset);
      T* to = tile + place_ + i * kRowStep * (kByReduction ? kPitch : 1);
      const bool inside = is_inside(row, k);
      if constexpr (kPack * sizeof(T) >= 4)
        device::cp_async_or_zero<kPack * sizeof(T)>(to, from, inside);
      else
        *to = inside ? device::load(from) : T{};
    }
  }

 private:
  static constexpr int kLanesK = kByReduction ? kReduction / kPack : kReduction;
  static constexpr int kLanesR = kThreads / kLanesK;
  static constexpr int kRowStep = kLanesR * (kByReduction ? 1 : kPack);
  static constexpr int kItems = kRows / kRowStep;
  static_assert(kThreads % kLanesK == 0 && kRows % kRowStep == 0);

  WEFT_DEVICE bool is_inside(const Spot& row, const Spot& k) const {
    if constexpr (!kBounded) return row.d + k.d >= 0;
    const auto within = [](int position, int extent) {
      return static_cast<unsigned>(position) < static_cast<unsigned>(extent);
    };
    return within(row.d + k.d, operand_.extent[0]) && within(row.h + k.h, operand_.extent[1]) &&
           within(row.w + k.w, operand_.extent[2]);
  }

  const Operand& operand_;
  const T* base_;
  int k_;
  int place_;
  Spot rows_[kItems];
};

}  // namespace
}  // namespace weft::WEFT_TARGET
