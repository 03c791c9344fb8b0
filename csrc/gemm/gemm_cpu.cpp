// Matrix products on CPU whose bits do not depend on the number of threads; see gemm/outer_cpu.h.
#include "gemm/gemm.h"

#include "core/scratch.h"
#include "gemm/outer_cpu.h"
#include "gemm/packed_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

void product(const ProductProblem& p, const void* a, const void* b, const void* add, void* c,
             const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const OuterProduct<T> outer{p, static_cast<const T*>(a), static_cast<const T*>(b),
                                static_cast<const T*>(add), static_cast<T*>(c)};
    outer.run(context, kGrain);
  });
}

constexpr int64_t kMostRows = 48;  // of C at a time: a multiple of every tile's height

// Rows [row, row + rows) of C, through `sums` [rows, all panels].
template <int kPanelVectors, class T, class C>
void packed_part(const PackedProblem& p, const T* a, const accumulate_t<T>* panels, int64_t row,
                 int64_t rows, C* c) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
  const int64_t width = ceil_div(p.n, kPanel) * kPanel;
  Scratch<Acc> sums(rows * width);
  Scratch<Acc> block(rows * kDepth);
  const Acc* from[kMostRows];
  Acc* to[kMostRows];
  for (int64_t k = 0; k < p.k; k += kDepth) {
    const int64_t depth = p.k - k < kDepth ? p.k - k : kDepth;
    const T* corner = a + row * p.a_row + k * p.a_column;
    if (p.a_row == 1) {
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t r = 0; r < rows; ++r)
          block[r * kDepth + i] = widen(corner[r + i * p.a_column]);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < depth; ++i)
          block[r * kDepth + i] = widen(corner[r * p.a_row + i * p.a_column]);
    }
    for (int64_t r = 0; r < rows; ++r) from[r] = block.data() + r * kDepth;
    for (int64_t column = 0; column < width; column += kPanel) {
      for (int64_t r = 0; r < rows; ++r) to[r] = sums.data() + r * width + column;
      packed_block<kPanelVectors>(from, int64_t{0}, rows, panels + column * p.k + k * kPanel, depth,
                                  k > 0, to);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < p.n; ++n)
      c[(row + r) * p.c_row + n] = narrow<C>(p.k > 0 ? sums[r * width + n] : Acc{0});
}

template <int kPanelVectors, class T, class C>
void packed_product(const PackedProblem& p, const T* a, const T* b, C* c, const Context& context) {
  constexpr int64_t kLane = kLanes<T>, kPanel = kPanelVectors * kLane;
  const int64_t panels = ceil_div(p.n, kPanel);
  Scratch<accumulate_t<T>> packed(panels * kPanel * p.k);
  parallel_for(context, panels * kPanelVectors, ceil_div(kGrain, p.k * kLane + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t column = i * kLane, panel = i / kPanelVectors;
                   pack_vector(b + column * p.b_column, p.b_row, p.b_column, p.n - column, p.k,
                               kPanelVectors,
                               packed.data() + panel * kPanel * p.k + i % kPanelVectors * kLane);
                 }
               });
  // Nearly equal blocks of rows, at least one for each thread.
  const int64_t blocks = ceil_div(p.m, kMostRows);
  const int64_t parts =
      p.m < context.threads ? p.m : ceil_div(blocks, context.threads) * context.threads;
  parallel_for(context, parts, ceil_div(kGrain, ceil_div(p.m, parts) * p.n * p.k + 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = p.m * i / parts;
                   packed_part<kPanelVectors>(p, a, packed.data(), row, p.m * (i + 1) / parts - row,
                                              c);
                 }
               });
}

void packed(const PackedProblem& p, const void* a, const void* b, void* c, const Context& context) {
  if (p.m == 0 || p.n == 0) return;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
    const auto run = [&](auto* result) {
      if (fewer_lanes_with_three<T>(p.n)) {
        packed_product<3>(p, left, right, result, context);
      } else {
        packed_product<4>(p, left, right, result, context);
      }
    };
    if (p.wide) return run(static_cast<accumulate_t<T>*>(c));
    run(static_cast<T*>(c));
  });
}

// The product of one row of ones: every element of A is the same 1.
void column_sums(const ProductProblem& p, const void* b, void* sums, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T one = narrow<T>(accumulate_t<T>{1});
    const ProductProblem row = {p.dtype, 1, p.n, p.k, 0, 0};
    const OuterProduct<T> outer{row, &one, static_cast<const T*>(b), nullptr,
                                static_cast<T*>(sums)};
    outer.run(context, kGrain);
  });
}

}  // namespace

const GemmKernels gemm_kernels = {product, packed, column_sums};

}  // namespace weft::WEFT_TARGET
