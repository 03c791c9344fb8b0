// Matrix products on CPU whose bits do not depend on the number of threads: of few rows or terms as
// in gemm/outer_cpu.h, else packed.
//
// Threads take blocks of rows of C, or panels of its columns where rows are few. Of a block, some
// 512 terms of A are copied, so that rows are neighbours, and pass by one panel of B after another;
// a tile of C is finished in registers, its runs of terms being added in the first-level cache, and
// goes to C once a block of terms. Bound: FLOPs. Lost: runs added in C itself and blocks of 128
// terms (a tenth: C lies in the third-level cache), C written without being fetched before.
#include "gemm/gemm.h"

#include "core/scratch.h"
#include "gemm/gradient_cpu.h"
#include "gemm/outer_cpu.h"
#include "gemm/panel_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

// Rows of C whose part of A is copied at once: many, so that long rows of a transposed A are read
// in one go.
constexpr int64_t kMostRows = 240;

// Rows [row, row + rows) and panels [begin, end) of C; block_of(panel, k, depth) is the packed B.
template <class Format, class T, class C, class BlockOf>
void packed_part(const PackedProblem& p, const T* a, const T* add, int64_t row, int64_t rows,
                 const PanelCut& cut, int64_t begin, int64_t end, const BlockOf& block_of, C* c) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>, kBlock = kDepth * Format::kTerms;
  constexpr bool kInPlace = std::is_same_v<C, Acc>;  // sums wait in C itself
  const int64_t first = cut.first(begin) * kLane, width = cut.first(end) * kLane - first;
  Scratch<Acc> waiting(!kInPlace && p.k > kBlock ? rows * width : 0), block(rows * kDepth);
  alignas(kVectorBytes) Acc held[kTileAccumulators * kLane];
  const Acc* from[kMostRows];
  for (int64_t r = 0; r < rows; ++r) from[r] = block.data() + r * kDepth;
  for (int64_t k = 0; k < p.k || k == 0; k += kBlock) {
    const int64_t depth = p.k - k < kBlock ? p.k - k : kBlock;
    const int64_t numbers = ceil_div(depth, Format::kTerms);
    Format::copy(a + row * p.a_row + k * p.a_column, p.a_row, p.a_column, rows, depth,
                 block.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = cut.first(i) * kLane, place = row * p.c_row + column;
      PanelOfC<T, C> panel = {};
      panel.out = c + place, panel.more = add ? add + place : nullptr, panel.out_row = p.c_row;
      if constexpr (kInPlace) {
        panel.waiting = panel.out, panel.waiting_row = p.c_row;
      } else {
        panel.waiting = waiting.data() + column - first, panel.waiting_row = width;
      }
      panel.begun = k > 0, panel.complete = k + kBlock >= p.k;
      panel.runs = numbers > 0 ? ceil_div(numbers, run_length(numbers)) : 1;
      panel.columns = p.n - column, panel.held = held;
      const Acc* terms = block_of(i, k, depth);
      const PackedBatch<Acc> batch = {from, 0, &terms, 1, 0, numbers};
      const TileOfC<T, C> tile = {panel};
      switch (cut.vectors(i)) {
        case 1:
          packed_batch<1, Format::kPairs, true>(batch, rows, tile);
          break;
        case 2:
          packed_batch<2, Format::kPairs, true>(batch, rows, tile);
          break;
        case 3:
          packed_batch<3, Format::kPairs, true>(batch, rows, tile);
          break;
        default:
          packed_batch<4, Format::kPairs, true>(batch, rows, tile);
      }
    }
  }
}

template <class Format, class T, class C>
void packed_product(const PackedProblem& p, const T* a, const T* b, const T* add, C* c,
                    const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>;
  const PanelCut cut(ceil_div(p.n, kLane));
  // Terms [k, k + depth) of a panel.
  const auto pack = [&](int64_t panel, int64_t k, int64_t depth, Acc* out) {
    const int vectors = cut.vectors(panel);
    for (int v = 0; v < vectors; ++v) {
      const int64_t column = (cut.first(panel) + v) * kLane;
      Format::pack(b + k * p.b_row + column * p.b_column, p.b_row, p.b_column, p.n - column, depth,
                   vectors, out + v * kLane);
    }
  };
  if (p.m <= kMostRows) {  // each block of B serves all rows at once
    parallel_for(context, cut.panels, ceil_div(kGrain, 4 * kLane * p.m * p.k + 1),
                 [&](int64_t begin, int64_t end) {
                   Scratch<Acc> room(4 * kLane * kDepth);
                   const auto block_of = [&](int64_t panel, int64_t k, int64_t depth) {
                     pack(panel, k, depth, room.data());
                     return room.data();
                   };
                   packed_part<Format>(p, a, add, 0, p.m, cut, begin, end, block_of, c);
                 });
    return;
  }
  const int64_t vector_size = kLane * ceil_div(p.k, Format::kTerms);
  Scratch<Acc> packed(cut.all_vectors() * vector_size);
  parallel_for(context, cut.panels, ceil_div(kGrain, 4 * p.k * kLane + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   pack(i, 0, p.k, packed.data() + cut.first(i) * vector_size);
               });
  // Nearly equal blocks of rows, at least one for each thread.
  const int64_t parts = ceil_div(ceil_div(p.m, kMostRows), context.threads) * context.threads;
  parallel_for(context, parts, ceil_div(kGrain, ceil_div(p.m, parts) * p.n * p.k + 1),
               [&](int64_t begin, int64_t end) {
                 const auto block_of = [&](int64_t panel, int64_t k, int64_t) {
                   return packed.data() + cut.first(panel) * vector_size +
                          k / Format::kTerms * cut.vectors(panel) * kLane;
                 };
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = p.m * i / parts;
                   packed_part<Format>(p, a, add, row, p.m * (i + 1) / parts - row, cut, 0,
                                       cut.panels, block_of, c);
                 }
               });
}

template <class T, class C>
void packed_any(const PackedProblem& p, const T* a, const T* b, const T* add, C* c,
                const Context& context) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>)
    if (has_pairs()) return packed_product<Paired>(p, a, b, add, c, context);
#endif
  packed_product<Widened>(p, a, b, add, c, context);
}

void packed(const PackedProblem& p, const void* a, const void* b, void* c, const Context& context) {
  if (p.m == 0 || p.n == 0) return;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto* result) {
      packed_any<T>(p, static_cast<const T*>(a), static_cast<const T*>(b), nullptr, result,
                    context);
    };
    if (p.wide) return run(static_cast<accumulate_t<T>*>(c));
    run(static_cast<T*>(c));
  });
}

// A product of fewer rows or terms is done before B is packed.
constexpr int64_t kPackedRows = 48, kPairedRows = 8, kPackedTerms = 8;

void product(const ProductProblem& p, const void* a, const void* b, const void* add, void* c,
             const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto *left = static_cast<const T*>(a), *right = static_cast<const T*>(b),
               *more = static_cast<const T*>(add);
    auto* result = static_cast<T*>(c);
    const bool pairs = std::is_same_v<T, bf16> && has_pairs();
    if (p.m >= (pairs ? kPairedRows : kPackedRows) && p.k >= kPackedTerms) {
      const PackedProblem q = {p.dtype, p.m, p.n, p.k, p.a_row, p.a_column, p.n, 1, p.n, false};
      return packed_any<T>(q, left, right, more, result, context);
    }
    const OuterProduct<T> outer{p, left, right, more, result};
    outer.run(context, kGrain);
  });
}

// The sum over the rows of B of `Vectors` vectors of columns from `column` on: a cascade of runs of
// kRun rows and of kRun runs, so that a long sum loses few bits, in an order that p.k alone
// decides. Several vectors at once, as rows of B are far apart.
template <int Vectors, class T>
void sum_columns(const ProductProblem& p, const T* b, T* sums, int64_t column) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kRun = 16;
  V run[Vectors] = {}, runs[Vectors] = {}, total[Vectors] = {};
  const auto each = [](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) body(v);
  };
  const auto count = [&](int v) __attribute__((always_inline)) {
    const int64_t left = p.n - column - v * kLanes<T>;
    return static_cast<int>(left < kLanes<T> ? left : kLanes<T>);
  };
  for (int64_t k = 0; k < p.k; ++k) {
    const T* from = b + k * p.n + column;
    each([&](int v) { run[v] += load_columns(from + v * kLanes<T>, count(v)); });
    if ((k + 1) % kRun != 0) continue;
    each([&](int v) { runs[v] += run[v], run[v] = V{}; });
    if ((k + 1) % (kRun * kRun) != 0) continue;
    each([&](int v) { total[v] += runs[v], runs[v] = V{}; });
  }
  each([&](int v) {
    store_columns(sums + column + v * kLanes<T>, total[v] + (runs[v] + run[v]), count(v));
  });
}

void column_sums(const ProductProblem& p, const void* b, void* sums, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kMost = 8;
    const int64_t vectors = ceil_div(p.n, kLanes<T>);
    parallel_for(context, vectors, 1 + 32768 / (kLanes<T> * (p.k + 1)),
                 [&](int64_t begin, int64_t end) {
                   const auto* from = static_cast<const T*>(b);
                   auto* to = static_cast<T*>(sums);
                   for (; begin + kMost <= end; begin += kMost)
                     sum_columns<kMost>(p, from, to, begin * kLanes<T>);
                   for (; begin < end; ++begin) sum_columns<1>(p, from, to, begin * kLanes<T>);
                 });
  });
}

}  // namespace

const GemmKernels gemm_kernels = {product, packed, weight_gradients, column_sums};

}  // namespace weft::WEFT_TARGET
