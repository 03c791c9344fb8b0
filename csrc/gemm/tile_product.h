// The tile product on CUDA: C[row, column] = epilogue(Σ_k A[row, k] · B[column, k]).
//
// A block owns a tile of C. Tiles of A and B flow through kStages buffers of shared memory by
// asynchronous copies, so that kStages - 1 are in flight while one is multiplied; one barrier a
// step tells both that a tile has landed and that the buffer which is filled next is no longer
// read. The finished tile is staged in the same memory and stored by whole packs along whichever
// index is contiguous. What A, B and C are is the caller's: see tile_operand.h.
//
// Bound: FLOPs where the reduction is long, the copies into shared memory else.
#pragma once

#include "gemm/tile_math.h"

namespace weft::WEFT_TARGET {
namespace {

// The tile of a block, its warps, and how it reads: packs of 16 bytes or single elements.
template <int M, int N, int K, int WarpsM, int WarpsN, int Stages, bool Packed>
struct TileShape {
  static constexpr int kM = M, kN = N, kK = K;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kStages = Stages;
  static constexpr bool kPacked = Packed;
};

// Everything that is equal for all blocks of a launch.
struct TileProduct {
  Operand a, b;
  IndexMap out_rows;
  int64_t out_column_step = 1;
  int64_t out_group_step = 0;
  int64_t out_split_step = 0;
  int rows = 0;
  int columns = 0;
  int reduction = 0;
  int tiles_m = 1, tiles_n = 1, groups = 1;
  int splits = 1;       // of the reduction
  int split_steps = 0;  // tiles of the reduction in each
  bool packed_out = false;

  int64_t blocks() const { return int64_t{1} * tiles_m * tiles_n * groups * splits; }
};

// A block's part: columns change fastest, so that blocks which run together share rows of A.
struct TilePlace {
  int row, column, group, split;
};

template <class Shape>
WEFT_DEVICE TilePlace place_of_block(const TileProduct& p, unsigned index) {
  TilePlace place;
  place.column = static_cast<int>(index % p.tiles_n) * Shape::kN;
  index /= p.tiles_n;
  place.row = static_cast<int>(index % p.tiles_m) * Shape::kM;
  index /= p.tiles_m;
  place.group = static_cast<int>(index % p.groups);
  place.split = static_cast<int>(index / p.groups);
  return place;
}

// T: elements of A and B; Out: of C, and of the staged tile.
template <class T, class Out, class MmaOperand, class Shape, Along kAlongA, Along kAlongB,
          bool kBoundedA, bool kBoundedB>
struct TileKernel {
  static constexpr int kPack = Shape::kPacked ? 16 / static_cast<int>(sizeof(T)) : 1;
  using LoaderA =
      OperandLoader<T, Shape::kM, Shape::kK, Shape::kThreads, kPack, kAlongA, kBoundedA>;
  using LoaderB =
      OperandLoader<T, Shape::kN, Shape::kK, Shape::kThreads, kPack, kAlongB, kBoundedB>;
  using Sums =
      std::conditional_t<std::is_same_v<MmaOperand, float>, PlainSums<T, Shape, LoaderA, LoaderB>,
                         TensorCoreSums<T, MmaOperand, Shape, LoaderA, LoaderB>>;
  using Acc = accumulate_t<T>;

  static constexpr int kOutPack = 16 / static_cast<int>(sizeof(Out));
  static constexpr int kStageElements = LoaderA::kElements + LoaderB::kElements;
  static constexpr int kStagesBytes = Shape::kStages * kStageElements * static_cast<int>(sizeof(T));
  // The staged tile lies along whichever index is contiguous in memory; the longer of the two.
  static constexpr int kOutElements =
      Shape::kM * Shape::kN + kOutPack * (Shape::kM > Shape::kN ? Shape::kM : Shape::kN);
  static constexpr int kOutBytes = kOutElements * static_cast<int>(sizeof(Out));
  static constexpr int kSharedBytes = kStagesBytes > kOutBytes ? kStagesBytes : kOutBytes;

  // Block `block` of the product; finish(column of the group, sum) is what is stored.
  template <class Finish>
  static WEFT_DEVICE void run(const TileProduct& p, unsigned block, const T* a, const T* b, Out* c,
                              const Finish& finish) {
    device::SharedMemory memory;
    auto* shared = memory.take<unsigned char>(kSharedBytes);
    const TilePlace place = place_of_block<Shape>(p, block);
    Sums sums;
    reduce(p, place, a, b, reinterpret_cast<T*>(shared), sums);
    store_tile(p, place, sums, reinterpret_cast<Out*>(shared), c, finish);
  }

 private:
  static WEFT_DEVICE void reduce(const TileProduct& p, const TilePlace& place, const T* a,
                                 const T* b, T* stages, Sums& sums) {
    const LoaderA load_a(p.a, a + place.group * p.a.group_step, place.row);
    const LoaderB load_b(p.b, b + place.group * p.b.group_step, place.column);
    const int first = place.split * p.split_steps;
    const int all = (p.reduction + Shape::kK - 1) / Shape::kK;
    const int end = first + p.split_steps < all ? first + p.split_steps : all;
    const auto fetch = [&](int step) {
      if (step < end) {
        T* stage = stages + (step - first) % Shape::kStages * kStageElements;
        load_a.copy(stage, step * Shape::kK);
        load_b.copy(stage + LoaderA::kElements, step * Shape::kK);
      }
      device::cp_async_commit();  // an empty group keeps the count
    };
    for (int ahead = 0; ahead < Shape::kStages - 1; ++ahead) fetch(first + ahead);
    for (int step = first; step < end; ++step) {
      device::cp_async_wait<Shape::kStages - 2>();
      device::barrier();
      fetch(step + Shape::kStages - 1);
      const T* stage = stages + (step - first) % Shape::kStages * kStageElements;
      sums.multiply(stage, stage + LoaderA::kElements);
    }
    device::cp_async_wait<0>();
    device::barrier();
  }

  template <class Finish>
  static WEFT_DEVICE void store_tile(const TileProduct& p, const TilePlace& place, const Sums& sums,
                                     Out* staged, Out* c, const Finish& finish) {
    const bool by_columns = p.out_column_step == 1;
    const int row_step = by_columns ? Shape::kN + kOutPack : 1;
    const int column_step = by_columns ? 1 : Shape::kM + kOutPack;
    sums.for_each([&](int row, int column, Acc sum) {
      if (place.column + column < p.columns)
        staged[row * row_step + column * column_step] =
            finish(place.group, place.column + column, sum);
    });
    device::barrier();
    c += place.group * p.out_group_step + place.split * p.out_split_step;
    if (!by_columns)
      store_columns(p, place, staged, c);
    else if (p.packed_out)
      store_rows<kOutPack>(p, place, staged, c);
    else
      store_rows<1>(p, place, staged, c);
  }

  // Rows of C lie apart, their columns together.
  template <int kTogether>
  static WEFT_DEVICE void store_rows(const TileProduct& p, const TilePlace& place,
                                     const Out* staged, Out* c) {
    constexpr int kPacks = Shape::kN / kTogether;
    constexpr int kRowsAtOnce = Shape::kThreads > kPacks ? Shape::kThreads / kPacks : 1;
    const int thread = device::thread_index();
    const int column = thread % kPacks * kTogether;
    if (place.column + column >= p.columns) return;
    for (int row = thread / kPacks; row < Shape::kM; row += kRowsAtOnce) {
      if (place.row + row >= p.rows) return;
      const Spot to = p.out_rows.template spot<false>(place.row + row);
      const Out* from = staged + row * (Shape::kN + kOutPack) + column;
      Out* at = c + to.offset + place.column + column;
      if constexpr (kTogether == 1)
        device::store(at, *from);
      else
        device::store(at, *reinterpret_cast<const device::Pack<Out, kTogether>*>(from));
    }
  }

  // Columns of C lie apart, their rows (mostly) together.
  static WEFT_DEVICE void store_columns(const TileProduct& p, const TilePlace& place,
                                        const Out* staged, Out* c) {
    static_assert(Shape::kThreads % Shape::kM == 0);
    const int thread = device::thread_index();
    const int row = thread % Shape::kM;
    if (place.row + row >= p.rows) return;
    const Spot to = p.out_rows.template spot<false>(place.row + row);
    for (int column = thread / Shape::kM; column < Shape::kN;
         column += Shape::kThreads / Shape::kM) {
      if (place.column + column >= p.columns) return;
      device::store(c + to.offset + (place.column + column) * p.out_column_step,
                    staged[column * (Shape::kM + kOutPack) + row]);
    }
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
