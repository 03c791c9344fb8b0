// Copies of a matrix in the order in which packed_cpu.h reads it, a vector at a time.
#pragma once

#include "core/transpose.h"

namespace weft::WEFT_TARGET {
namespace {

// A sum is made in runs of nearly equal length, each added to those before it. Runs of 64 terms err
// half to two thirds of what torch's products do, and cost 2 % of a tile; where k is small, the
// products are not what counts, and shorter runs err less. (One run of 128 terms of a small k erred
// up to 1.7 times as much as torch's products.)
constexpr int64_t run_length(int64_t k) {
  const int64_t most = k <= 96 ? 16 : k <= 192 ? 32 : 64, runs = (k + most - 1) / most;
  return runs > 1 ? (k + runs - 1) / runs : most;
}

// out[i * step + j] = source[j * stride + i] for i < length and one vector of lanes j; zero where
// j >= count.
template <class T>
void copy_transposed(const T* source, int64_t stride, int64_t count, int64_t length,
                     accumulate_t<T>* out, int64_t step) {
  constexpr int kLane = kLanes<T>;
  for (int64_t first = 0; first < length; first += kLane) {
    const auto left = static_cast<int>(length - first < kLane ? length - first : kLane);
    Vec<accumulate_t<T>> rows[kLane];
#pragma GCC unroll 16
    for (int j = 0; j < kLane; ++j) {
      const T* at = source + j * stride + first;
      rows[j] = j >= count      ? Vec<accumulate_t<T>>{}
                : left == kLane ? load_vec(at)
                                : load_part(at, left);
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLane; ++i)
      if (i < left) store_vec(out + (first + i) * step, rows[i]);
  }
}

// Lane j of the panel's row i is source[i * k_stride + j * stride], i < k; zero where j >= count.
// One call fills one vector of each row of a panel of `vectors`.
template <class T>
void pack_vector(const T* source, int64_t k_stride, int64_t stride, int64_t count, int64_t k,
                 int vectors, accumulate_t<T>* panel) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t step = vectors * kLane;
  if (k_stride == 1) return copy_transposed(source, stride, count, k, panel, step);
  if (stride == 1) {
    const auto lanes = static_cast<int>(count < kLane ? count : kLane);
    for (int64_t i = 0; i < k; ++i)
      store_vec(panel + i * step, lanes == kLane ? load_vec(source + i * k_stride)
                                  : lanes > 0    ? load_part(source + i * k_stride, lanes)
                                                 : Vec<accumulate_t<T>>{});
    return;
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < kLane; ++j)
      panel[i * step + j] =
          j < count ? widen(source[i * k_stride + j * stride]) : accumulate_t<T>{0};
}

}  // namespace
}  // namespace weft::WEFT_TARGET
