// Matrix products on CPU whose bits do not depend on the number of threads; see gemm/outer_cpu.h.
#include "gemm/gemm.h"

#include "core/scratch.h"
#include "gemm/outer_cpu.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

// Rows of C at a time, multiples of every tile's height: many, so that long rows of a transposed A
// are read in one go, as long as what they add up to stays in the second-level cache.
constexpr int64_t kLeastRows = 48, kMostRows = 240;
constexpr int64_t kMostSums = 1 << 17;

// How packed operands lie: numbers of the accumulation type, or words of two bf16.
struct Widened {
  static constexpr bool kPairs = false;
  static constexpr int64_t kTerms = 1;  // in a number of a packed operand

  // Terms [0, k) of one vector of columns.
  template <class T>
  static void pack(const T* b, int64_t k_stride, int64_t stride, int64_t count, int64_t k,
                   int vectors, accumulate_t<T>* panel) {
    pack_vector(b, k_stride, stride, count, k, vectors, panel);
  }
  // Terms [0, k) of rows of A, to rows of kDepth.
  template <class T>
  static void copy(const T* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                   accumulate_t<T>* out) {
    if (row_stride == 1) {
      for (int64_t i = 0; i < k; i += kLanes<T>)
        copy_transposed(a + i * k_stride, k_stride, k - i, rows, out + i, kDepth);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = a + r * row_stride;
      int64_t i = 0;
      for (; k_stride == 1 && i + kLanes<T> <= k; i += kLanes<T>)
        store_vec(out + r * kDepth + i, load_vec(from + i));
      for (; i < k; ++i) out[r * kDepth + i] = widen(from[i * k_stride]);
    }
  }
};

#if defined(__AVX512F__)
struct Paired {
  static constexpr bool kPairs = true;
  static constexpr int64_t kTerms = 2;

  static void pack(const bf16* b, int64_t k_stride, int64_t stride, int64_t count, int64_t k,
                   int vectors, float* panel) {
    pack_pairs(b, k_stride, stride, count, k, vectors, panel);
  }
  static void copy(const bf16* a, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                   float* out) {
    copy_pairs(a, row_stride, k_stride, rows, k, out, kDepth);
  }
};
#endif

// Rows [row, row + rows) and panels [begin, end) of C; block_of(panel, k, depth) is the packed B.
template <class Format, int kPanelVectors, class T, class C, class BlockOf>
void packed_part(const PackedProblem& p, const T* a, const T* add, int64_t row, int64_t rows,
                 int64_t begin, int64_t end, const BlockOf& block_of, C* c) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  // Panels that C holds in full are added up there, the others in `sums`.
  const int64_t full = std::is_same_v<C, Acc> ? (p.n / kPanel < end ? p.n / kPanel : end) : begin;
  const int64_t first = full > begin ? full : begin, width = (end - first) * kPanel;
  Scratch<Acc> sums(rows * width), block(rows * kDepth);
  const Acc* from[kMostRows];
  Acc* to[kMostRows];
  for (int64_t r = 0; r < rows; ++r) from[r] = block.data() + r * kDepth;
  constexpr int64_t kBlock = kDepth * Format::kTerms;
  for (int64_t k = 0; k < p.k || k == 0; k += kBlock) {
    const int64_t depth = p.k - k < kBlock ? p.k - k : kBlock;
    Format::copy(a + row * p.a_row + k * p.a_column, p.a_row, p.a_column, rows, depth,
                 block.data());
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t r = 0; r < rows; ++r) {
        to[r] = sums.data() + r * width + (panel - first) * kPanel;
        if constexpr (std::is_same_v<C, Acc>)
          if (panel < first) to[r] = c + (row + r) * p.c_row + panel * kPanel;
      }
      packed_rows<kPanelVectors, Format::kPairs>(from, rows, block_of(panel, k, depth),
                                                 ceil_div(depth, Format::kTerms), k > 0, to);
    }
  }
  const int64_t last = end * kPanel < p.n ? end * kPanel : p.n;
  for (int64_t r = 0; r < rows; ++r) {
    C* out = c + (row + r) * p.c_row;
    const Acc* sum = sums.data() + r * width - first * kPanel;
    for (int64_t n = first * kPanel; n < last; ++n) out[n] = narrow<C>(sum[n]);
    if (add == nullptr) continue;
    const T* more = add + (row + r) * p.c_row;
    for (int64_t n = begin * kPanel; n < last; ++n) {
      const Acc found = n < first * kPanel ? widen(out[n]) : sum[n];
      out[n] = narrow<C>(found + widen(more[n]));
    }
  }
}

template <class Format, int kPanelVectors, class T, class C>
void packed_product(const PackedProblem& p, const T* a, const T* b, const T* add, C* c,
                    const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>, kPanel = kPanelVectors * kLane;
  const int64_t panels = ceil_div(p.n, kPanel);
  // Terms [k, k + depth) of vector i of all panels.
  const auto pack = [&](int64_t i, int64_t k, int64_t depth, Acc* out) {
    const int64_t column = i * kLane;
    Format::pack(b + k * p.b_row + column * p.b_column, p.b_row, p.b_column, p.n - column, depth,
                 kPanelVectors, out + i % kPanelVectors * kLane);
  };
  if (p.m <= kMostRows) {  // each block of B serves all rows at once
    parallel_for(context, panels, ceil_div(kGrain, kPanel * p.m * p.k + 1),
                 [&](int64_t begin, int64_t end) {
                   Scratch<Acc> room(kPanel * kDepth);
                   const auto block_of = [&](int64_t panel, int64_t k, int64_t depth) {
                     for (int64_t v = 0; v < kPanelVectors; ++v)
                       pack(panel * kPanelVectors + v, k, depth, room.data());
                     return room.data();
                   };
                   packed_part<Format, kPanelVectors>(p, a, add, 0, p.m, begin, end, block_of, c);
                 });
    return;
  }
  const int64_t panel_size = kPanel * ceil_div(p.k, Format::kTerms);
  Scratch<Acc> packed(panels * panel_size);
  parallel_for(context, panels * kPanelVectors, ceil_div(kGrain, p.k * kLane + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   pack(i, 0, p.k, packed.data() + i / kPanelVectors * panel_size);
               });
  // Nearly equal blocks of rows, at least one for each thread.
  const int64_t fitting = kMostSums / (panels * kPanel) / kLeastRows * kLeastRows;
  const int64_t most = fitting < kLeastRows  ? kLeastRows
                       : fitting > kMostRows ? kMostRows
                                             : fitting;
  const int64_t parts = ceil_div(ceil_div(p.m, most), context.threads) * context.threads;
  parallel_for(context, parts, ceil_div(kGrain, ceil_div(p.m, parts) * p.n * p.k + 1),
               [&](int64_t begin, int64_t end) {
                 const auto block_of = [&](int64_t panel, int64_t k, int64_t) {
                   return packed.data() + panel * panel_size + k / Format::kTerms * kPanel;
                 };
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = p.m * i / parts;
                   packed_part<Format, kPanelVectors>(p, a, add, row, p.m * (i + 1) / parts - row,
                                                      0, panels, block_of, c);
                 }
               });
}

template <class T, class C>
void packed_any(const PackedProblem& p, const T* a, const T* b, const T* add, C* c,
                const Context& context) {
  const auto run = [&](auto format) {
    using Format = decltype(format);
    if (fewer_lanes_with_three<T>(p.n)) return packed_product<Format, 3>(p, a, b, add, c, context);
    packed_product<Format, 4>(p, a, b, add, c, context);
  };
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>)
    if (has_pairs()) return run(Paired{});
#endif
  run(Widened{});
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

// Columns [column, column + count) of the sum over the rows of B: a cascade of runs of kRun rows
// and of kRun runs, so that a long sum loses few bits, in an order that p.k alone decides.
template <class T>
WEFT_INLINE void sum_columns(const ProductProblem& p, const T* b, T* sums, int64_t column,
                             int count) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kRun = 16;
  V run = {}, runs = {}, total = {};
  for (int64_t k = 0; k < p.k; ++k) {
    const T* from = b + k * p.n + column;
    run += count == kLanes<T> ? load_vec(from) : load_part(from, count);
    if ((k + 1) % kRun != 0) continue;
    runs += run;
    run = V{};
    if ((k + 1) % (kRun * kRun) != 0) continue;
    total += runs;
    runs = V{};
  }
  total += runs + run;
  if (count == kLanes<T>) return store_vec(sums + column, total);
  store_part(sums + column, total, count);
}

void column_sums(const ProductProblem& p, const void* b, void* sums, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kWidth = kLanes<T>;
    parallel_for(context, ceil_div(p.n, kWidth), 1 + 32768 / (kWidth * (p.k + 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t v = begin; v < end; ++v) {
                     const int64_t left = p.n - v * kWidth;
                     sum_columns(p, static_cast<const T*>(b), static_cast<T*>(sums), v * kWidth,
                                 static_cast<int>(left < kWidth ? left : kWidth));
                   }
                 });
  });
}

}  // namespace

const GemmKernels gemm_kernels = {product, packed, column_sums};

}  // namespace weft::WEFT_TARGET
