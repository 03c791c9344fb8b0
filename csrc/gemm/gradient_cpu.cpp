// The gradients of weights on CPU: sums over all rows of a sequence, A^T times one or two factors.
//
// Both operands lie with the rows that are summed outermost, so neither is transposed: of some 512
// rows, A is copied in strips, a tile's rows side by side, and the factors in panels. Threads pack
// the panels together, meet, and multiply them with their own strips, a panel staying in the
// second-level cache while the strips pass by; C is finished as in gemm_cpu.cpp. Two factors share
// A, which is read and copied once. Bound: FLOPs.
// Lost: A transposed, so that a row's terms are neighbours (1.4 cycles a number: with few columns a
// fifth of the whole).
#include "gemm/panel_cpu.h"

#include "core/parallel.h"
#include "gemm/gemm.h"
#include "gemm/gradient_cpu.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kStrip = kTileRows<4>;

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kGrain = 1 << 18;

// A strip's numbers, so many that no two strips begin at the same place of a page.
constexpr int64_t kStripSize = kStrip * kDepth + 16;

// True if gradient_work holds the strips of any number of columns; it repeats itself in kStrip.
constexpr bool strips_fit() {
  for (int64_t m = 1; m <= 64 * kStrip; ++m)
    if (ceil_div(m, int64_t{kStrip}) * kStripSize > gradient_strip_numbers(m)) return false;
  return true;
}
static_assert(kDepth == kGradientRows && strips_fit());

// Terms [0, k) of a panel's columns, of which there are `count`; rows of B are `stride` apart.
template <class Format, class T>
void pack_panel(const T* b, int64_t stride, int64_t count, int64_t k, int vectors,
                accumulate_t<T>* panel) {
  constexpr int64_t kLane = kLanes<T>;
  const int64_t width = vectors * kLane;
  for (int64_t i = 0; i * Format::kTerms < k; ++i)
    for (int64_t column = 0; column < width; column += kLane)
      store_vec(panel + i * width + column,
                Format::load_row(b + column, stride, i * Format::kTerms, k, count - column));
}

// Terms [0, k) of strips of rows of the transposed A; `rows` of them in all. Some terms of a strip
// at once, as every strip is in another page; the next ones are fetched meanwhile, as a row of A is
// too far from the one before it for the processor to foresee.
template <class Format, class T>
void copy_strips(const T* a, int64_t stride, int64_t rows, int64_t k, accumulate_t<T>* out) {
  constexpr int64_t kAtOnce = 8;
  const int64_t numbers = ceil_div(k, Format::kTerms);
  for (int64_t first = 0; first < numbers; first += kAtOnce) {
    const int64_t last = first + kAtOnce < numbers ? first + kAtOnce : numbers;
    for (int64_t row = 0; row < rows; row += kStrip) {
      accumulate_t<T>* to = out + row / kStrip * kStripSize + first * kStrip;
      const int count = rows - row < kStrip ? static_cast<int>(rows - row) : kStrip;
      for (int64_t i = first; i < last; ++i, to += kStrip) {
        __builtin_prefetch(a + (i + kAtOnce) * Format::kTerms * stride + row);
        if constexpr (std::is_same_v<T, accumulate_t<T>>) {
          const T* from = a + i * stride + row;
          if (count == kStrip) {
            memcpy(to, from, kStrip * sizeof(T));
          } else {
            for (int r = 0; r < count; ++r) to[r] = from[r];
          }
        } else {
          store_part(to, Format::load_row(a + row, stride, i * Format::kTerms, k, count), count);
        }
      }
    }
  }
}

// The products of one strip and one panel over k numbers or words, in runs.
template <bool kPairs, int Rows, int Vectors, class Acc, class Target>
__attribute__((noinline)) void strip_tile(const Acc* a, const Acc* panel, int64_t k, Target to) {
  using V = Vec<Acc>;
  const int64_t run = run_length(k);
  for (; k > 0; k -= run) {
    V sum[Rows][Vectors] = {};
    const int64_t terms = k < run ? k : run;
#pragma GCC unroll 4
    for (int64_t i = 0; i < terms; ++i, a += kStrip, panel += Vectors * kLanes<Acc>) {
      V value[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) value[v] = load_vec(panel + v * kLanes<Acc>);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          if constexpr (kPairs) {
            add_pairs(sum[r][v], broadcast_word(a + r), value[v]);
          } else {
            sum[r][v] += a[r] * value[v];
          }
        }
      }
    }
    to.finish(sum);
  }
}

template <bool kPairs, int Rows, int Vectors, class Acc, class Target>
WEFT_INLINE void strip_tile_of(int rows, const Acc* a, const Acc* panel, int64_t k,
                               const Target& to) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return strip_tile_of<kPairs, Rows - 1, Vectors>(rows, a, panel, k, to);
  }
  strip_tile<kPairs, Rows, Vectors>(a, panel, k, to);
}

template <bool kPairs, int Vectors, class Acc, class Target>
WEFT_INLINE void strip_tile_of(int vectors, int rows, const Acc* a, const Acc* panel, int64_t k,
                               const Target& to) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors)
      return strip_tile_of<kPairs, Vectors - 1>(vectors, rows, a, panel, k, to);
  }
  strip_tile_of<kPairs, kStrip, Vectors>(rows, a, panel, k, to);
}

template <class Format, class T>
void gradients(const GradientProblem& p, const T* a, const GradientFactor (&factors)[2],
               accumulate_t<T>* work, const Context& context) {
  using Acc = accumulate_t<T>;
  constexpr int64_t kLane = kLanes<T>, kBlock = kDepth * Format::kTerms;
  constexpr bool kInPlace = std::is_same_v<T, Acc>;  // sums wait in C itself
  const PanelCut cuts[2] = {PanelCut(ceil_div(factors[0].n, kLane)),
                            PanelCut(ceil_div(factors[1].n, kLane))};
  const int64_t vectors = cuts[0].all_vectors() + cuts[1].all_vectors();
  const int64_t panels = cuts[0].panels + cuts[1].panels, strips = ceil_div(p.m, int64_t{kStrip});
  const int64_t numbers = p.k < kBlock ? ceil_div(p.k, Format::kTerms) : kDepth;
  const int64_t block_size = vectors * kLane * numbers;
  Acc* const packed = work;  // two blocks
  Acc* const copied = packed + 2 * block_size;
  Acc* const waiting = copied + strips * kStripSize;  // of half types
  const int64_t columns = factors[0].n + factors[1].n;
  const int64_t worth = p.m * columns * p.k / kGrain;
  parallel_team(context, worth < strips ? worth : strips, [&](const Team& team) {
    const int64_t first = team.begin(strips) * kStrip;
    const int64_t last = team.end(strips) * kStrip, rows = (last < p.m ? last : p.m) - first;
    Acc* own = copied + team.begin(strips) * kStripSize;
    alignas(kVectorBytes) Acc held[kTileAccumulators * kLane];
    for (int64_t k = 0; k < p.k; k += kBlock) {
      const int64_t depth = p.k - k < kBlock ? p.k - k : kBlock;
      // Of two buffers, the other one is still read by those who are behind.
      Acc* block = packed + k / kBlock % 2 * block_size;
      const auto factor_of = [&](int64_t panel) { return panel < cuts[0].panels ? 0 : 1; };
      const auto place_of = [&](int64_t panel) {
        const int f = factor_of(panel);
        return block + (f * cuts[0].all_vectors() + cuts[f].first(panel - f * cuts[0].panels)) *
                           kLane * numbers;
      };
      for (int64_t i = team.begin(panels); i < team.end(panels); ++i) {
        const int f = factor_of(i);
        const int64_t panel = i - f * cuts[0].panels, column = cuts[f].first(panel) * kLane;
        const GradientFactor& factor = factors[f];
        const int width = cuts[f].vectors(panel);
        const auto pack = [&](const void* from, int64_t row, int64_t begin, int64_t end) {
          if (begin >= end) return;
          pack_panel<Format>(static_cast<const T*>(from) + row * factor.n + column, factor.n,
                             factor.n - column, end - begin, width,
                             place_of(i) + (begin - k) / Format::kTerms * width * kLane);
        };
        const int64_t turn = factor.head_rows < k           ? k
                             : factor.head_rows > k + depth ? k + depth
                                                            : factor.head_rows;
        pack(factor.head, k, k, turn);
        pack(factor.tail, turn - factor.head_rows, turn, k + depth);
      }
      if (rows > 0) copy_strips<Format>(a + k * p.a_row + first, p.a_row, rows, depth, own);
      team.barrier();
      const int64_t terms = ceil_div(depth, Format::kTerms);
      for (int64_t i = 0; i < panels; ++i) {
        const int f = factor_of(i);
        const int64_t column = cuts[f].first(i - f * cuts[0].panels) * kLane;
        const GradientFactor& factor = factors[f];
        PanelOfC<T, T> panel = {};
        panel.out = static_cast<T*>(factor.gradient) + first * factor.n + column;
        panel.out_row = factor.n;
        if constexpr (kInPlace) {
          panel.waiting = panel.out, panel.waiting_row = factor.n;
        } else {
          panel.waiting_row = vectors * kLane;
          panel.waiting =
              waiting + first * panel.waiting_row + f * cuts[0].all_vectors() * kLane + column;
        }
        panel.begun = k > 0, panel.complete = k + kBlock >= p.k;
        panel.runs = ceil_div(terms, run_length(terms));
        panel.columns = factor.n - column, panel.held = held;
        const Acc* strip = own;
        for (int64_t row = 0; row < rows; row += kStrip, strip += kStripSize) {
          const int count = rows - row < kStrip ? static_cast<int>(rows - row) : kStrip;
          strip_tile_of<Format::kPairs, 4>(cuts[f].vectors(i - f * cuts[0].panels), count, strip,
                                           place_of(i), terms, TileOfC<T, T>{panel, row});
        }
      }
    }
  });
}

}  // namespace

void weight_gradients(const GradientProblem& p, const void* a, const GradientFactor (&factors)[2],
                      void* work, const Context& context) {
  if (p.m == 0) return;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* of = static_cast<const T*>(a);
    auto* room = static_cast<accumulate_t<T>*>(work);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
      if (has_pairs()) return gradients<Paired>(p, of, factors, room, context);
#endif
    gradients<Widened>(p, of, factors, room, context);
  });
}

}  // namespace weft::WEFT_TARGET
