// The maximum with its place as one integer, which large windows are reduced with on CPU.
//
// A key of 64 bits is the value, as an integer that orders as floats do, above the complement of
// the place: the larger of two keys is the larger value and, of equal values, the first place. So
// the walk of pool_values.h, with its doubling and its transpositions, serves maxima with places
// too: windows cost the same few passes whatever their size. NaN is the largest value and keeps its
// place as it is, so the last NaN wins; -0 is made +0, which it equals.
//
// Along D and H the rows of a window are compared as floats with the number of the row (half the
// work of keys); keys are made of what is left. A place has bits for D, H and W side by side: W is
// the position in the line, H the row of the window or, where rows are reduced by doubling, of the
// strip. Lost: keys for small windows, where comparing one by one is less than making keys; keys of
// 32 bits for half types, which leave 16 for the place.
#pragma once

#include "pool/pool_lines.h"

namespace weft::WEFT_TARGET {
namespace {

// float, bf16 and f16 as float.
template <class T>
struct KeyOf {
  using E = int64_t;
  using V = Vec<int64_t>;
  static constexpr int64_t kWidth = kVectorBytes / 8;
  static constexpr bool kIdempotent = true;
  static constexpr bool kPlaces = true;
  static constexpr E kNeutral = std::numeric_limits<int64_t>::min();

  using Half = vector_of<int32_t, static_cast<int>(kWidth)>::type;
  static constexpr int32_t kNan = std::numeric_limits<int32_t>::max();
  static constexpr int32_t kLowest = ~0x7F800000;  // -inf

  static WEFT_INLINE V reduce(V best, V value) { return value > best ? value : best; }

  template <class I>
  static WEFT_INLINE I flip(I bits) {
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
  }
  static WEFT_INLINE Half ordered(V key) { return __builtin_convertvector(key >> 32, Half); }
  static WEFT_INLINE Half place(V key) {
    const Half bits = __builtin_convertvector(key, Half);
    return ordered(key) == kNan ? bits : ~bits;
  }
  // The values of the keys; padding is -inf.
  static WEFT_INLINE void store(T* address, V key) {
    const Half value = ordered(key);
    const Half bits = flip(value < kLowest ? Half{} + kLowest : value);
    Vec<float> wide = {};
    memcpy(&wide, &bits, sizeof(bits));
    T values[2 * kWidth];
    store_vec(values, wide);
    memcpy(static_cast<void*>(address), values, kWidth * sizeof(T));
  }
};

// A row of floats before it becomes keys.
template <class T>
struct RowOf {
  using V = Vec<float>;
  static WEFT_INLINE V load(const T* address) { return load_vec(address) + 0.0f; }
};

// kVectors vectors of keys from element j on; `load` reads a vector of a source.
template <class T, int kVectors, class Load>
WEFT_INLINE void keys_of_rows(const T* const* sources, const int32_t* rows, int64_t count,
                              int64_t j, const int32_t* columns, int64_t* keys, const Load& load) {
  using Op = KeyOf<T>;
  constexpr int64_t kWidth = kLanes<float>;
  Vec<float> best[kVectors];
  Vec<int32_t> place[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    best[v] = load(sources[0] + j + v * kWidth);
    place[v] = broadcast<Vec<int32_t>>(rows[0]);
  }
  for (int64_t k = 1; k < count; ++k)
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> value = load(sources[k] + j + v * kWidth);
      const auto replace = (value > best[v]) | (value != value);
      best[v] = replace ? value : best[v];
      place[v] = replace ? broadcast<Vec<int32_t>>(rows[k]) : place[v];
    }
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = j + v * kWidth;
    place[v] |= load_lanes(columns + at);
    Vec<int32_t> bits;
    memcpy(&bits, &best[v], sizeof(bits));
    const auto nan = best[v] != best[v];
    const Vec<int32_t> value = nan ? Vec<int32_t>{} + Op::kNan : Op::flip(bits);
    Vec<int32_t> low, high;  // lower halves of keys come first in memory
    interleave(nan ? place[v] : ~place[v], value, low, high);
    memcpy(keys + at, &low, sizeof(low));
    memcpy(keys + at + kWidth / 2, &high, sizeof(high));
  }
}

// keys[j] = the largest of sources[k][j], k in [0, count), with the place rows[k] | columns[j].
// Writes up to a vector of T beyond n.
template <class T>
void reduce_rows_to_keys(const T* const* sources, const int32_t* rows, int64_t count, int64_t n,
                         const int32_t* columns, int64_t* keys) {
  constexpr int64_t kWidth = kLanes<float>;
  const auto whole = [](const T* row) {
    prefetch_ahead(row);
    return RowOf<T>::load(row);
  };
  int64_t j = 0;
  for (; j + kBlock * kWidth <= n; j += kBlock * kWidth)
    keys_of_rows<T, kBlock>(sources, rows, count, j, columns, keys, whole);
  for (; j + kWidth <= n; j += kWidth)
    keys_of_rows<T, 1>(sources, rows, count, j, columns, keys, whole);
  if (j < n)
    keys_of_rows<T, 1>(sources, rows, count, j, columns, keys,
                       [&](const T* row) { return load_some<RowOf<T>>(row, n - j); });
}

// How the bits of a place are split.
struct PlaceBits {
  int w = 0, h = 0;

  explicit PlaceBits(const PoolProblem& p) : w(pool_place_bits(p, 2)), h(pool_place_bits(p, 1)) {}

  int32_t row(int64_t i, int64_t j) const { return static_cast<int32_t>((i << h | j) << w); }
};

// The place of a key inside its window, row by row, as it is kept.
template <class T, class Place>
class PlaceOfKey {
 public:
  using Op = KeyOf<T>;
  using I = typename Op::Half;

  // For parts of at most `width` outputs; `by_strips` tells what H is.
  PlaceOfKey(const PoolProblem& p, int64_t width, bool by_strips, Place* places)
      : p_(p),
        bits_(p),
        by_strips_(by_strips),
        places_(places),
        first_(width * p.inner + Op::kWidth) {
    for (int64_t j = 0; j < width * p.inner; ++j)
      first_[j] = static_cast<int32_t>(j / p.inner * p.window[2].stride);
  }

  // The part's outputs; its windows begin at row `strip_row` of the strip.
  void start(const RowPart& part, int64_t strip_row) {
    row_ = places_ +
           (((part.outer * p_.out[0] + part.d) * p_.out[1] + part.h) * p_.out[2] + part.begin) *
               p_.inner;
    n_ = (part.end - part.begin) * p_.inner;
    strip_row_ = static_cast<int32_t>(strip_row);
  }
  WEFT_INLINE typename Op::V operator()(int64_t j, typename Op::V key) const {
    const I place = Op::place(key);
    I first;
    memcpy(&first, first_.data() + j, sizeof(first));
    const I w = steps((place & ((1 << bits_.w) - 1)) - first, p_.window[2].dilation);
    I h = (place >> bits_.w) & ((1 << bits_.h) - 1);
    if (by_strips_) h = steps(h - strip_row_, p_.window[1].dilation);
    const I d = place >> (bits_.w + bits_.h);
    const auto rows = d * static_cast<int32_t>(p_.window[1].size) + h;
    const auto found = rows * static_cast<int32_t>(p_.window[2].size) + w;
    // A window without an input has no place.
    const I kept = Op::ordered(key) < Op::kLowest ? I{} : found;
    using Narrow = typename vector_of<Place, static_cast<int>(Op::kWidth)>::type;
    const Narrow narrow = __builtin_convertvector(kept, Narrow);
    const int64_t left = n_ - j;
    if (left >= Op::kWidth) {
      memcpy(row_ + j, &narrow, sizeof(narrow));
    } else {
      memcpy(row_ + j, &narrow, left * sizeof(Place));
    }
    return key;
  }

 private:
  // distance / dilation, which divides it.
  static WEFT_INLINE I steps(I distance, int64_t dilation) {
    if (dilation == 1) return distance;
    using F = typename vector_of<float, static_cast<int>(Op::kWidth)>::type;
    const F steps = (__builtin_convertvector(distance, F) + 0.5f) / static_cast<float>(dilation);
    return __builtin_convertvector(steps, I);
  }

  const PoolProblem& p_;
  const PlaceBits bits_;
  const bool by_strips_;
  Place* places_;
  Place* row_ = nullptr;
  int64_t n_ = 0;
  int32_t strip_row_ = 0;
  Scratch<int32_t> first_;  // where an output's window begins in the line
};

}  // namespace
}  // namespace weft::WEFT_TARGET
