// What the CPU kernels of both layouts share: fprop and dgrad as one gather.
//
// Both are dst[j, at] = Σ_{i, place} src[i, source_of(at, place)] · w[i, j, place]: fprop reads the
// input for each output, dgrad reads the output's gradient for each input. They differ in which
// channels are which and in the arithmetic of positions alone.
#pragma once

#include "conv/conv.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

struct Gather {
  bool transposed;       // dgrad
  int64_t src_channels;  // of one group
  int64_t dst_channels;
  const int64_t (&src)[3];
  const int64_t (&dst)[3];

  int64_t src_positions() const { return src[0] * src[1] * src[2]; }
  int64_t dst_positions() const { return dst[0] * dst[1] * dst[2]; }
};

inline Gather fprop_gather(const ConvProblem& p) { return {false, p.c, p.k, p.in, p.out}; }
inline Gather dgrad_gather(const ConvProblem& p) { return {true, p.k, p.c, p.out, p.in}; }

WEFT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
WEFT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
WEFT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Outputs so large do not fit into the cache beside what is read for them, and are streamed past
// it.
inline bool conv_streams(int64_t bytes) { return bytes >= int64_t{8} << 20; }

// The source position that destination position `at` reads at window place `place`, or -1.
WEFT_INLINE int64_t source_of(const Window& window, int64_t at, int64_t place, int64_t extent,
                              bool transposed) {
  int64_t source;
  if (transposed) {
    const int64_t padded = at + window.padding - place * window.dilation;
    if (padded < 0 || padded % window.stride != 0) return -1;
    source = padded / window.stride;
  } else {
    source = window.first_input(at) + place * window.dilation;
  }
  return source >= 0 && source < extent ? source : -1;
}

// The source positions that destinations [begin, end) may read.
inline Range sources_of(const Window& window, int64_t begin, int64_t end, int64_t extent,
                        bool transposed) {
  int64_t first, last;
  if (transposed) {
    const int64_t low = begin + window.padding - window.span() + 1;
    first = low > 0 ? ceil_div(low, window.stride) : 0;
    last = (end - 1 + window.padding) / window.stride;
  } else {
    first = most(window.first_input(begin), 0);
    last = window.first_input(end - 1) + window.span() - 1;
  }
  last = least(last + 1, extent);
  return first < last ? Range{first, last} : Range{0, 0};
}

// Destination positions first, first + step, ... of an axis.
struct AxisPhase {
  int64_t first;
  int64_t step;
  int64_t count;
};

inline AxisPhase axis_phase(const Window& w, int64_t begin, int64_t end, int64_t phase,
                            bool transposed) {
  if (!transposed) return {begin, 1, end - begin};
  const int64_t offset = (phase - w.padding - begin) % w.stride;
  const int64_t first = begin + (offset < 0 ? offset + w.stride : offset);
  return {first, w.stride, first < end ? ceil_div(end - first, w.stride) : 0};
}

// Sums are taken of about so many products at a time, then added: shorter chains of additions round
// less.
inline constexpr int64_t kTerms = 32;

// The output columns whose place `offset` (in input columns, padding taken off) lies inside.
inline Range columns_inside(const Window& w, int64_t offset, int64_t in, int64_t out) {
  const int64_t begin = offset >= 0 ? 0 : ceil_div(-offset, w.stride);
  const int64_t available = in - offset;
  const int64_t end = available > 0 ? least(ceil_div(available, w.stride), out) : 0;
  return {begin, most(begin, end)};
}

// Splits `count` images into a number of chunks that depends on the problem alone, at least about
// `kTasks` tasks in all: what is summed over images is summed chunk by chunk, so its bits do not
// depend on how many threads there are.
inline int64_t image_chunks(int64_t images, int64_t tasks_per_chunk) {
  constexpr int64_t kTasks = 16;
  return most(1, least(images, ceil_div(kTasks, most(tasks_per_chunk, 1))));
}

// Images go a few at a time: they stay in the cache while all places go through them, and copies of
// them are small.
inline int64_t images_at_a_time(int64_t images, int64_t elements) {
  constexpr int64_t kElements = 1 << 20;
  const int64_t count = most(1, kElements / most(elements, 1));
  return least(images, round_up(count, 2));  // which weight gradients take in pairs
}

template <int n>
struct Count {
  static constexpr int value = n;
};
// Calls body(Count<count>); count is in [1, kMost].
template <int kMost, class Body>
WEFT_INLINE void with_count(int64_t count, const Body& body) {
  if constexpr (kMost > 1)
    if (count < kMost) return with_count<kMost - 1>(count, body);
  body(Count<kMost>{});
}
// Calls body(Count<n>, first) over [0, count) in steps of at most kMax.
template <int kMax, class Body>
WEFT_INLINE void in_steps(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kMax <= count; i += kMax) body(Count<kMax>{}, i);
  if constexpr (kMax > 4) {
    if (i + 4 <= count) {
      body(Count<4>{}, i);
      i += 4;
    }
  }
  if constexpr (kMax > 3) {
    if (i + 3 == count) {
      body(Count<3>{}, i);
      i += 3;
    }
  }
  if constexpr (kMax > 2) {
    if (i + 2 <= count) {
      body(Count<2>{}, i);
      i += 2;
    }
  }
  if constexpr (kMax > 1) {
    if (i < count) body(Count<1>{}, i);
  }
}

// Calls body(Count<n>, first) over [0, count) in the fewest steps of at most kMost, of nearly equal
// size.
template <int kMost, class Body>
WEFT_INLINE void for_equal_parts(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count;) {
    const int64_t parts = ceil_div(count - first, kMost);
    const int64_t taken = ceil_div(count - first, parts);
    with_count<kMost>(taken, [&](auto n) { body(n, first); });
    first += taken;
  }
}

// The first `count` elements, of which a vector takes what it holds.
template <class T>
WEFT_INLINE Vec<accumulate_t<T>> load_lanes(const T* address, int64_t count) {
  return count >= kLanes<T> ? load_vec(address) : load_part(address, static_cast<int>(count));
}
template <class T>
WEFT_INLINE void store_lanes(T* address, Vec<accumulate_t<T>> value, int64_t count) {
  if (count >= kLanes<T>)
    store_vec(address, value);
  else
    store_part(address, value, static_cast<int>(count));
}

template <class T>
void copy_row(accumulate_t<T>* out, const T* in, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_vec(out + i, load_vec(in + i));
  if (i < count)
    store_part(out + i, load_part(in + i, static_cast<int>(count - i)),
               static_cast<int>(count - i));
}

template <class T>
void copy_rows(accumulate_t<T>* out, const T* in, int64_t count, const Context& context) {
  constexpr int64_t kBlock = 4096;
  parallel_for(context, ceil_div(count, kBlock), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock;
    copy_row(out + first, in + first, least(end * kBlock, count) - first);
  });
}

// A tensor in the accumulation type: itself, or a widened copy of half elements.
template <class T>
class Widened {
 public:
  using Acc = accumulate_t<T>;
  static constexpr bool kCopies = sizeof(T) != sizeof(Acc);

  Widened(const T* data, int64_t count, const Context& context)
      : data_(reinterpret_cast<const Acc*>(data)) {
    if constexpr (kCopies) {
      copy_.resize(count);
      data_ = copy_.data();
      copy_rows(copy_.data(), data, count, context);
    }
  }
  const Acc* data() const { return data_; }

 private:
  Scratch<Acc> copy_;
  const Acc* data_;
};

// Integers as wide as an element: lanes of a mask.
template <class Acc>
struct LaneMask {
  using type = int32_t;
};
template <>
struct LaneMask<double> {
  using type = int64_t;
};

template <class Acc>
WEFT_INLINE Acc sum_of_lanes(Vec<Acc> value) {
  constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(Acc));
  Acc lanes[kCount];
  store_vec(lanes, value);
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
}  // namespace weft::WEFT_TARGET
