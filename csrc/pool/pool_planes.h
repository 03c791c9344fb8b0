// Global pooling on CPU, values alone: one output per plane. Bound: bytes, the input.
//
// A plane is reduced to one vector by four accumulators with unit stride; as many such vectors as
// have lanes are then reduced at once by a transposition in halves, so that a plane costs about
// four instructions beyond its loads, which counts for planes of a few dozen elements.
// Planes larger than a block are reduced block by block, and blocks are work for many threads.
// Sums are added up in a cascade: blocks of kRun vectors, then blocks, so that any size loses few
// bits, and the order is the problem's alone.
//
// Channels-last maps are rows of as many whole pixels as make a few hundred elements; sixteen rows
// at a time are reduced to one, then such rows to one, then its pixels by halves.
#pragma once

#include "core/parallel.h"
#include "pool/pool_lines.h"

namespace weft::WEFT_TARGET {
namespace {

// The reduction of n > 0 elements, lane by lane. Elements up to `readable` exist.
template <class Op, class T>
WEFT_INLINE typename Op::V reduce_run(const T* x, int64_t n, int64_t readable) {
  using V = typename Op::V;
  constexpr int64_t kWidth = Op::kWidth;
  constexpr int64_t kRun = 16 * kBlock * kWidth;
  const V neutral = broadcast<V>(Op::kNeutral);
  V total = neutral;
  int64_t j = 0;
  while (j + kWidth <= n) {
    V sum[kBlock] = {neutral, neutral, neutral, neutral};
    const int64_t stop = j + kRun < n ? j + kRun : n;
    for (; j + kBlock * kWidth <= stop; j += kBlock * kWidth)
      for (int b = 0; b < kBlock; ++b) {
        prefetch_ahead(x + j + b * kWidth);
        sum[b] = Op::reduce(sum[b], Op::load(x + j + b * kWidth));
      }
    for (; j + kWidth <= stop; j += kWidth) sum[0] = Op::reduce(sum[0], Op::load(x + j));
    total = Op::reduce(total, Op::reduce(Op::reduce(sum[0], sum[1]), Op::reduce(sum[2], sum[3])));
  }
  if (j < n) {
    const V last = j + kWidth <= readable ? Op::load(x + j) : load_some<Op>(x + j, n - j);
    total = Op::reduce(total, neutral_after<Op>(last, n - j));
  }
  return total;
}

// The place of the maximum `best` of a run: the first of equal elements, the last NaN.
template <class T>
WEFT_INLINE int64_t place_in_run(const T* x, int64_t n, accumulate_t<T> best) {
  if (best != best) {
    int64_t place = n - 1;
    while (widen(x[place]) == widen(x[place])) --place;
    return place;
  }
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>)
    if (const uint64_t equal = lanes_that_hold(load_vec(x + j) == best))
      return j + __builtin_ctzll(equal);
  while (widen(x[j]) != best) ++j;
  return j;
}

// y[plane] = finish(reduction of the plane).
template <class Op, class T, class Finish>
void reduce_planes(const PoolProblem& p, const T* x, T* y, const Context& context,
                   const Finish& finish) {
  using V = typename Op::V;
  constexpr int64_t kWidth = Op::kWidth;
  constexpr int64_t kPiece = 65536;  // elements of a large plane that one thread reduces at a time
  const int64_t size = p.in_positions();
  const int64_t planes = p.outer;
  const int64_t pieces = ceil_div(size, kPiece);
  Scratch<V> partial(pieces > 1 ? planes * pieces : 0);
  if (pieces > 1)
    parallel_for(context, planes * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t at = item % pieces * kPiece;
        const int64_t n = size - at < kPiece ? size - at : kPiece;
        const int64_t from = item / pieces * size + at;
        partial[item] = reduce_run<Op>(x + from, n, planes * size - from);
      }
    });
  const int64_t groups = ceil_div(planes, kWidth);
  parallel_for(
      context, groups, pieces > 1 ? groups : 1 + kPoolGrain / (kWidth * size),
      [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kWidth; first < end * kWidth; first += kWidth) {
          const int64_t count = planes - first < kWidth ? planes - first : kWidth;
          V values[kWidth];
          for (int64_t l = 0; l < kWidth; ++l) {
            const int64_t plane = first + (l < count ? l : 0);
            if (pieces == 1) {
              values[l] =
                  l < count ? reduce_run<Op>(x + plane * size, size, (planes - plane) * size) : V{};
              continue;
            }
            values[l] = partial[plane * pieces];
            for (int64_t k = 1; k < pieces; ++k)
              values[l] = Op::reduce(values[l], partial[plane * pieces + k]);
          }
          store_row<Op>(y + first, 0, count, finish(reduce_lanes<Op>(values)));
        }
      });
}

constexpr int64_t kRowElements = 512;      // of whole pixels of channels-last maps
constexpr int64_t kChannelsAtOnce = 1024;  // where a pixel has more

// Channels [c_begin, c_end) of image `outer` of a channels-last problem.
template <class Op, class T, class Finish>
void reduce_pixels(const PoolProblem& p, const T* x, T* y, int64_t outer, int64_t c_begin,
                   int64_t c_end, Scratch<typename Op::E> (&levels)[3], const Finish& finish) {
  using E = typename Op::E;
  constexpr int64_t kWidth = Op::kWidth;
  constexpr int64_t kRows = 16;
  const int64_t channels = c_end - c_begin;
  const int64_t positions = p.in_positions();
  // Pixels are neighbours in memory only if all channels are taken.
  int64_t pixels = channels == p.inner ? kRowElements / channels : 1;
  pixels = pixels < 1 ? 1 : pixels > positions ? positions : pixels;
  const int64_t n = pixels * channels;
  const int64_t rows = positions / pixels;
  // One row; the sum of kRows; the sum of kRows of those.
  for (auto& level : levels) fill_lanes(level.data(), round_up(n, kWidth) + kWidth, Op::kNeutral);
  // The rows that are reduced next; those of one step are too near.
  const int64_t ahead = kRows * pixels * p.inner * static_cast<int64_t>(sizeof(T));
  const T* image = x + outer * positions * p.inner + c_begin;
  const T* sources[kRows];
  int64_t groups = 0;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = rows - r < kRows ? rows - r : kRows;
    for (int64_t k = 0; k < count; ++k) sources[k] = image + (r + k) * pixels * p.inner;
    reduce_rows<Op>(sources, count, n, levels[0].data(), ahead);
    reduce_into<Op>(levels[1].data(), levels[0].data(), n);
    if (++groups % kRows != 0) continue;
    reduce_into<Op>(levels[2].data(), levels[1].data(), n);
    fill_lanes(levels[1].data(), n, Op::kNeutral);
  }
  const int64_t left = (positions - rows * pixels) * channels;  // a last, shorter row
  if (left > 0) {
    sources[0] = image + rows * n;
    reduce_rows<Op>(sources, 1, left, levels[0].data());
    fill_lanes(levels[0].data() + left, n + kWidth - left, Op::kNeutral);
    reduce_into<Op>(levels[1].data(), levels[0].data(), n);
  }
  E* total = levels[2].data();
  reduce_into<Op>(total, levels[1].data(), n);
  // The second half of the row's pixels is added to the first, until one is left.
  for (int64_t count = pixels; count > 1; count -= count / 2) {
    const int64_t half = count / 2 * channels;
    memcpy(levels[0].data(), total + count * channels - half, half * sizeof(E));
    fill_lanes(levels[0].data() + half, kWidth, Op::kNeutral);
    reduce_into<Op>(total, levels[0].data(), half);
  }
  T* out = y + outer * p.inner + c_begin;
  for (int64_t j = 0; j < channels; j += kWidth)
    store_row<Op>(out, j, channels, finish(load_lanes(total + j)));
}

// y = finish(reduction of each plane), for both layouts.
template <class Op, class T, class Finish>
void reduce_globally(const PoolProblem& p, const T* x, T* y, const Context& context,
                     const Finish& finish) {
  if (p.inner == 1) return reduce_planes<Op>(p, x, y, context, finish);
  const int64_t chunks = ceil_div(p.inner, kChannelsAtOnce);
  const int64_t items = p.outer * chunks;
  parallel_for(context, items, 1 + kPoolGrain * items / p.in_elements(),
               [&](int64_t begin, int64_t end) {
                 Scratch<typename Op::E> levels[3];
                 for (auto& level : levels) level.resize(kChannelsAtOnce + 2 * Op::kWidth);
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t c = item % chunks * kChannelsAtOnce;
                   const int64_t left = p.inner - c;
                   const int64_t c_end = c + (left < kChannelsAtOnce ? left : kChannelsAtOnce);
                   reduce_pixels<Op>(p, x, y, item / chunks, c, c_end, levels, finish);
                 }
               });
}

}  // namespace
}  // namespace weft::WEFT_TARGET
