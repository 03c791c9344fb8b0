// The arithmetic of a tile product: operands in shared memory, sums in registers.
//
// A block's tile is kM x kN; `multiply` adds the product of one tile of A and one of B, kK deep,
// and `for_each` tells where each sum of this thread belongs. On tensor cores a warp owns kM /
// kWarpsM x kN / kWarpsN sums as mma fragments: 16-bit operands come by ldmatrix, whichever way
// they lie, others element by element from rows padded apart in the banks. In full float32 a thread
// owns every 16th row and column. Sums run over k in ascending order, always.
#pragma once

#include <type_traits>

#include "device/mma.h"
#include "gemm/tile_operand.h"

namespace weft::WEFT_TARGET {
namespace {

// T is the element type; Operand what mma multiplies: T itself, or tf32 for float.
template <class T, class MmaOperand, class Shape, class LoaderA, class LoaderB>
class TensorCoreSums {
 public:
  using Acc = accumulate_t<T>;
  using Mma = device::Mma<MmaOperand>;

  WEFT_DEVICE TensorCoreSums() {
    const int warp = device::thread_index() / 32;
    row_ = warp / Shape::kWarpsN * kWarpM;
    column_ = warp % Shape::kWarpsN * kWarpN;
  }

  WEFT_DEVICE void multiply(const T* a, const T* b) {
    WEFT_UNROLL
    for (int k = 0; k < Shape::kK; k += Mma::kK) {
      typename Mma::A rows[kTilesM];
      typename Mma::B columns[kTilesN];
      WEFT_UNROLL
      for (int i = 0; i < kTilesM; ++i) rows[i] = load_a(a, row_ + i * Mma::kM, k);
      load_b(b, k, columns);
      WEFT_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        WEFT_UNROLL
        for (int j = 0; j < kTilesN; ++j) device::mma<MmaOperand>(sums_[i][j], rows[i], columns[j]);
      }
    }
  }

  // visit(row, column, sum) with the place in the block's tile.
  template <class Visit>
  WEFT_DEVICE void for_each(const Visit& visit) const {
    const int g = device::lane() / 4, t = device::lane() % 4;
    WEFT_UNROLL
    for (int i = 0; i < kTilesM; ++i) {
      WEFT_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        WEFT_UNROLL
        for (int v = 0; v < kValues; ++v)
          visit(row_ + i * Mma::kM + g + v / 2 * 8, column_ + j * Mma::kN + 2 * t + v % 2,
                sums_[i][j][v]);
      }
    }
  }

 private:
  static constexpr int kWarpM = Shape::kM / Shape::kWarpsM;
  static constexpr int kWarpN = Shape::kN / Shape::kWarpsN;
  static constexpr int kTilesM = kWarpM / Mma::kM;
  static constexpr int kTilesN = kWarpN / Mma::kN;
  static constexpr int kValues = Mma::kM * Mma::kN / 32;
  static_assert(kWarpM % Mma::kM == 0 && kTilesN % 2 == 0 && Shape::kK % Mma::kK == 0);

  template <class Loader>
  static WEFT_DEVICE const T& element(const T* tile, int row, int k) {
    return tile[Loader::kByReduction ? row * Loader::kPitch + k : k * Loader::kPitch + row];
  }

  // Matrices [row][k] of 8 x 8 elements: `row` and `k` are of this lane's row of its matrix.
  template <class Loader>
  static WEFT_DEVICE device::Pack<uint32_t, 4> matrices(const T* tile, int row, int k) {
    const int i = device::lane() % 8;
    return Loader::kByReduction ? device::ldmatrix(&element<Loader>(tile, row + i, k))
                                : device::ldmatrix_transposed(&element<Loader>(tile, row, k + i));
  }

  static WEFT_DEVICE typename Mma::A load_a(const T* a, int row, int k) {
    const int g = device::lane() / 4, t = device::lane() % 4;
    if constexpr (sizeof(T) == 2) {
      const int matrix = device::lane() / 8;
      return matrices<LoaderA>(a, row + matrix % 2 * 8, k + matrix / 2 * 8);
    } else if constexpr (sizeof(T) == 4) {
      typename Mma::A words;
      WEFT_UNROLL
      for (int i = 0; i < 4; ++i)
        words[i] = device::to_tf32(element<LoaderA>(a, row + g + i % 2 * 8, k + t + i / 2 * 4));
      return words;
    } else {
      return {{element<LoaderA>(a, row + g, k + t)}};
    }
  }

  WEFT_DEVICE void load_b(const T* b, int k, typename Mma::B (&columns)[kTilesN]) const {
    const int g = device::lane() / 4, t = device::lane() % 4;
    WEFT_UNROLL
    for (int j = 0; j < kTilesN; ++j) {
      const int column = column_ + j * Mma::kN;
      if constexpr (sizeof(T) == 2) {
        if (j % 2 != 0) continue;  // two tiles come at a time
        const int matrix = device::lane() / 8;
        const auto words = matrices<LoaderB>(b, column + matrix / 2 * 8, k + matrix % 2 * 8);
        columns[j] = {{words[0], words[1]}};
        columns[j + 1] = {{words[2], words[3]}};
      } else if constexpr (sizeof(T) == 4) {
        columns[j] = {{device::to_tf32(element<LoaderB>(b, column + g, k + t)),
                       device::to_tf32(element<LoaderB>(b, column + g, k + t + 4))}};
      } else {
        columns[j] = {{element<LoaderB>(b, column + g, k + t)}};
      }
    }
  }

  int row_;
  int column_;
  typename Mma::C sums_[kTilesM][kTilesN] = {};
};

// Products and sums in T itself, for float32 where TF32 is not allowed.
template <class T, class Shape, class LoaderA, class LoaderB>
class PlainSums {
 public:
  using Acc = accumulate_t<T>;

  // A warp covers 4 rows x 8 columns of the grid of threads, which no padding makes collide.
  WEFT_DEVICE PlainSums() {
    const int warp = device::thread_index() / 32;
    row_ = warp / 2 * 4 + device::lane() / 8;
    column_ = warp % 2 * 8 + device::lane() % 8;
  }

  WEFT_DEVICE void multiply(const T* a, const T* b) {
    WEFT_UNROLL_BY(4)
    for (int k = 0; k < Shape::kK; ++k) {
      Acc rows[kRows];
      Acc columns[kColumns];
      WEFT_UNROLL
      for (int i = 0; i < kRows; ++i) rows[i] = element<LoaderA>(a, row_ + i * kGrid, k);
      WEFT_UNROLL
      for (int j = 0; j < kColumns; ++j) columns[j] = element<LoaderB>(b, column_ + j * kGrid, k);
      WEFT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        WEFT_UNROLL
        for (int j = 0; j < kColumns; ++j) sums_[i][j] += rows[i] * columns[j];
      }
    }
  }

  template <class Visit>
  WEFT_DEVICE void for_each(const Visit& visit) const {
    WEFT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      WEFT_UNROLL
      for (int j = 0; j < kColumns; ++j) visit(row_ + i * kGrid, column_ + j * kGrid, sums_[i][j]);
    }
  }

 private:
  static constexpr int kGrid = 16;
  static constexpr int kRows = Shape::kM / kGrid;
  static constexpr int kColumns = Shape::kN / kGrid;
  static_assert(Shape::kThreads == kGrid * kGrid);

  template <class Loader>
  static WEFT_DEVICE const T& element(const T* tile, int row, int k) {
    return tile[Loader::kByReduction ? row * Loader::kPitch + k : k * Loader::kPitch + row];
  }

  int row_;
  int column_;
  Acc sums_[kRows][kColumns] = {};
};

}  // namespace
}  // namespace weft::WEFT_TARGET
