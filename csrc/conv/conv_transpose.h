// Transposed copies on CPU, by squares that stay in registers: contiguous tensors as channels-last
// ones and back.
#pragma once

#include <type_traits>

#include "conv/conv_gather.h"
#include "gemm/pack_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Elements as plain bits, as many as a vector of the accumulation type has.
template <class T>
struct TransposeTile {
  static constexpr int kSize = static_cast<int>(kLanes<T>);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  using V = typename vector_of<Bits, kSize>::type;
  // Rows lie far apart, and are asked for some squares ahead.
  static constexpr int64_t kAhead = 512 / sizeof(T);

  // A square of kSize rows and columns.
  static WEFT_INLINE void run(const T* in, int64_t in_step, T* out, int64_t out_step) {
    V row[kSize];
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) {
      memcpy(&row[i], in + i * in_step, sizeof(V));
      __builtin_prefetch(in + i * in_step + kAhead);
    }
    transpose(row);
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i)
      memcpy(static_cast<void*>(out + i * out_step), &row[i], sizeof(V));
  }
  // One with fewer rows or columns.
  static void run_part(const T* in, int64_t in_step, int64_t rows, int64_t columns, T* out,
                       int64_t out_step) {
    V row[kSize] = {};
    for (int64_t i = 0; i < rows; ++i) memcpy(&row[i], in + i * in_step, columns * sizeof(T));
    transpose(row);
    for (int64_t i = 0; i < columns; ++i)
      memcpy(static_cast<void*>(out + i * out_step), &row[i], rows * sizeof(T));
  }
};

// [count, rows, columns] as [count, columns, rows].
template <class T>
void transpose(const T* in, int64_t count, int64_t rows, int64_t columns, T* out,
               const Context& context) {
  constexpr int64_t kSize = TransposeTile<T>::kSize;
  const int64_t bands = ceil_div(columns, kSize);
  parallel_for(context, count * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * kSize;
      const int64_t width = least(kSize, columns - first);
      const T* const from = in + task / bands * rows * columns + first;
      T* const to = out + task / bands * rows * columns + first * rows;
      for (int64_t row = 0; row < rows; row += kSize) {
        const int64_t height = least(kSize, rows - row);
        if (width == kSize && height == kSize)
          TransposeTile<T>::run(from + row * columns, columns, to + row, rows);
        else if (height >= 4)
          TransposeTile<T>::run_part(from + row * columns, columns, height, width, to + row, rows);
        else
          for (int64_t c = 0; c < width; ++c)
            for (int64_t r = row; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
      }
    }
  });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
