// Pooling on CPU of contiguous maps of few positions: a plane in each lane of a vector.
//
// Rows of a few elements cost as much as rows of a few vectors. So as many planes as a vector has
// lanes are read at once, by squares that are turned round in registers; a position is then a
// vector, and windows are reduced one axis after the other, each by the few vectors that it holds,
// whatever their extents, padding, stride or dilation, adaptive or not. The gradient of the average
// is the same with the outputs that hold an input for the inputs of an output. All of it stays in
// the cache; results are turned back as they are stored. Threads own runs of planes.
//
// Bound: turning round, about half a cycle an element. Lost: planes as the channels of one
// channels-last map for the walks of pool_values.h, which cost each block of planes a start, and
// each of its rows another.
#include "core/transpose.h"
#include "pool/pool_cpu.h"
#include "pool/pool_reduce.h"
#include "pool/pool_rows.h"

namespace weft::WEFT_TARGET {
namespace {

// What the targets of one axis read: `count` sources each, from `first` on, `step` apart.
struct Reach {
  int64_t sources, targets;
  int64_t step = 1;
  Scratch<int64_t> first, count;
  Scratch<int64_t> place;  // of the first, in the window
  bool identity;           // each target is its source

  // Outputs read inputs or, `inverse`, inputs the outputs that hold them.
  Reach(const PoolProblem& p, int axis, bool inverse)
      : sources(inverse ? p.out[axis] : p.in[axis]),
        targets(inverse ? p.in[axis] : p.out[axis]),
        first(targets),
        count(targets),
        place(targets),
        identity(sources == targets) {
    const PoolWindow& window = p.window[axis];
    if (!inverse && !window.adaptive()) step = window.dilation;
    for (int64_t t = 0; t < targets; ++t) {
      const Range range =
          inverse ? outputs_covering(window, t, p.out[axis]) : places_inside(window, t, p.in[axis]);
      place[t] = range.begin;
      first[t] = inverse ? range.begin : window.first_input(t) + range.begin * step;
      count[t] = range.end > range.begin ? range.end - range.begin : 0;
      identity &= first[t] == t && count[t] == 1 && (inverse || range.begin == 0);
    }
  }
  int64_t most() const { return sources > targets ? sources : targets; }
};

// The rows of a map of `rows` x `width`, in parts that stay in the first-level cache. No part is
// smaller than a vector unless it is the whole map.
struct Parts {
  int64_t rows, width, count;

  Parts(int64_t rows, int64_t width) : rows(rows), width(width) {
    constexpr int64_t kPositions = 256;
    count = rows * width / kPositions;
    count = count > rows ? rows : count < 1 ? 1 : count;
  }
  int64_t begin(int64_t part) const { return rows * part / count; }
  int64_t most_positions() const { return ceil_div(rows, count) * width; }
};

// One axis, of vectors of planes: to [outer, targets, inner] from [outer, sources, inner].
template <class Op>
void reduce_axis(const Reach& reach, int64_t outer, int64_t inner, const typename Op::E* from,
                 typename Op::E* to) {
  constexpr int64_t kWidth = Op::kWidth;
  const int64_t step = reach.step * inner * kWidth;
  for (int64_t o = 0; o < outer; ++o, from += reach.sources * inner * kWidth)
    for (int64_t t = 0; t < reach.targets; ++t, to += inner * kWidth) {
      const auto* source = from + reach.first[t] * inner * kWidth;
      const int64_t count = reach.count[t];
      for (int64_t i = 0; i < inner * kWidth; i += kWidth) {
        auto sum = count > 0 ? load_lanes(source + i) : broadcast<typename Op::V>(Op::kNeutral);
        for (int64_t s = 1; s < count; ++s)
          sum = Op::reduce(sum, load_lanes(source + i + s * step));
        store_lanes(to + i, sum);
      }
    }
}

// The same of maxima with the places that they come from; a place along this axis counts `unit`.
// Without `from_places` those are all 0.
template <class A, class I>
void reduce_axis_places(const Reach& reach, int64_t unit, int64_t outer, int64_t inner,
                        const A* from, const I* from_places, A* to, I* to_places) {
  constexpr int64_t kWidth = kLanes<A>;
  const int64_t step = reach.step * inner * kWidth;
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t t = 0; t < reach.targets; ++t) {
      const int64_t source = (o * reach.sources + reach.first[t]) * inner * kWidth;
      const int64_t target = (o * reach.targets + t) * inner * kWidth;
      const int64_t count = reach.count[t];
      for (int64_t i = 0; i < inner * kWidth; i += kWidth) {
        auto best = broadcast<Vec<A>>(-std::numeric_limits<A>::infinity());
        Vec<I> place = {};
        for (int64_t s = 0; s < count; ++s) {
          const int64_t at = source + i + s * step;
          const auto value = load_lanes(from + at);
          const I along = static_cast<I>((reach.place[t] + s) * unit);
          const auto mine =
              (from_places == nullptr ? Vec<I>{} : load_lanes(from_places + at)) + along;
          const auto replace = (value > best) | (value != value);
          best = s == 0 || replace ? value : best;
          place = s == 0 || replace ? mine : place;
        }
        store_lanes(to + target + i, best);
        store_lanes(to_places + target + i, place);
      }
    }
}

// Positions [0, n) of `count` planes, `pitch` elements apart, in squares that are turned round:
// emit(position, vector of planes), whose lanes from `count` on are zero. What lies before `end`
// may be read.
template <class T, class Emit>
WEFT_INLINE void read_planes(const T* x, int64_t count, int64_t pitch, int64_t n, const T* end,
                             const Emit& emit) {
  constexpr int64_t kSide = kLanes<T>;
  constexpr int64_t kAhead = 4096;
  const int64_t group = kSide * pitch * static_cast<int64_t>(sizeof(T));
  const int64_t ahead = group < kAhead ? kAhead : group;
  for (int64_t next = 0; next < n; next += kSide) {
    // The last square overlaps the one before.
    const int64_t c = n > kSide && next + kSide > n ? n - kSide : next;
    const int64_t width = n < kSide ? n : kSide;
    Vec<accumulate_t<T>> square[kSide] = {};
#pragma GCC unroll 16
    for (int64_t l = 0; l < kSide; ++l) {
      if (l >= count) continue;
      const T* from = x + l * pitch + c;
      // The planes of the next group: no prefetcher follows so many runs.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + ahead));
      square[l] = from + kSide <= end ? load_vec(from) : load_part(from, static_cast<int>(width));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i)
      if (i < width) emit(c + i, square[i]);
  }
}

// The way back: `value(position)` makes the vector of a position, `store(vector, element, width)`
// stores a plane's positions, of which `width` are wanted; what it writes too much, planes to come
// overwrite.
template <int64_t kSide, class Value, class Store>
WEFT_INLINE void write_planes(int64_t count, int64_t pitch, int64_t n, const Value& value,
                              const Store& store) {
  for (int64_t next = 0; next < n; next += kSide) {
    const int64_t c = n > kSide && next + kSide > n ? n - kSide : next;
    const int64_t width = n < kSide ? n : kSide;
    decltype(value(0)) square[kSide] = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kSide; ++i)
      if (i < width) square[i] = value(c + i);
    transpose(square);
#pragma GCC unroll 16
    for (int64_t l = 0; l < kSide; ++l)
      if (l < count) store(square[l], l * pitch + c, width);
  }
}

// A vector of T, whole where that ends before `end`.
template <class T>
WEFT_INLINE void store_before(const T* end, T* to, Vec<accumulate_t<T>> value, int64_t width) {
  if (to + kLanes<T> <= end) return store_vec(to, value);
  store_part(to, value, static_cast<int>(width));
}

// What the windows' sums are divided by.
template <class A>
class LaneDivisors {
 public:
  explicit LaneDivisors(const PoolProblem& p) : each_(p.out_positions()) {
    int64_t at = 0;
    for (int64_t d = 0; d < p.out[0]; ++d)
      for (int64_t h = 0; h < p.out[1]; ++h)
        for (int64_t w = 0; w < p.out[2]; ++w)
          each_[at++] = static_cast<A>(pool_divisor(p, d, h, w));
  }
  WEFT_INLINE Vec<A> operator()(int64_t position) const {
    return broadcast<Vec<A>>(each_[position]);
  }

 private:
  Scratch<A> each_;
};

// The walk of planes [begin, end), as many at a time as a vector has lanes.
template <class T>
class LaneWalk {
 public:
  using A = accumulate_t<T>;
  using I = lane_int<A>;
  static constexpr int64_t kWidth = kLanes<T>;

  LaneWalk(const PoolProblem& p, bool inverse, bool places)
      : p_(p),
        reach_{{p, 0, inverse}, {p, 1, inverse}, {p, 2, inverse}},
        parts_(p.in[0] * p.in[1], p.in[2]),
        part_(parts_.most_positions() * kWidth),
        map_(most_positions() * kWidth),
        spare_(most_positions() * kWidth),
        map_places_(places ? most_positions() * kWidth : 0),
        spare_places_(places ? most_positions() * kWidth : 0) {}

  void average(const T* x, T* y, int64_t begin, int64_t end) {
    const LaneDivisors<A> divisors(p_);
    const int64_t in = p_.in_positions(), out = p_.out_positions();
    for (int64_t plane = begin; plane < end; plane += kWidth) {
      const int64_t count = end - plane < kWidth ? end - plane : kWidth;
      A* map = map_.data();
      for_parts([&](int64_t first, int64_t rows) {
        read_part(x + plane * in, count, first, rows, x + p_.outer * in);
        reduce_axis<SumOf<T>>(reach_[2], rows, 1, part_.data(), map + first * p_.out[2] * kWidth);
      });
      map = reduce_rest<SumOf<T>>();
      write_planes<kWidth>(
          count, out, out, [&](int64_t at) { return load_lanes(map + at * kWidth) / divisors(at); },
          [&](Vec<A> value, int64_t at, int64_t width) {
            store_before(y + end * out, y + plane * out + at, value, width);
          });
    }
  }

  // From gradients of outputs to those of inputs.
  void average_gradient(const T* gy, T* gx, int64_t begin, int64_t end) {
    const LaneDivisors<A> divisors(p_);
    const int64_t in = p_.in_positions(), out = p_.out_positions();
    for (int64_t plane = begin; plane < end; plane += kWidth) {
      const int64_t count = end - plane < kWidth ? end - plane : kWidth;
      read_planes(gy + plane * out, count, out, out, gy + p_.outer * out,
                  [&](int64_t at, Vec<A> value) {
                    store_lanes(map_.data() + at * kWidth, value / divisors(at));
                  });
      const A* map = spread_rest();
      for_parts([&](int64_t first, int64_t rows) {
        reduce_axis<SumOf<T>>(reach_[2], rows, 1, map + first * p_.out[2] * kWidth, part_.data());
        write_planes<kWidth>(
            count, in, rows * p_.in[2],
            [&](int64_t at) { return load_lanes(part_.data() + at * kWidth); },
            [&](Vec<A> value, int64_t at, int64_t width) {
              store_before(gx + end * in, gx + plane * in + first * p_.in[2] + at, value, width);
            });
      });
    }
  }

  // `places` may be null.
  template <class Place>
  void maximum(const T* x, T* y, Place* places, int64_t begin, int64_t end) {
    const int64_t in = p_.in_positions(), out = p_.out_positions();
    for (int64_t plane = begin; plane < end; plane += kWidth) {
      const int64_t count = end - plane < kWidth ? end - plane : kWidth;
      A* map = map_.data();
      I* map_places = map_places_.data();
      for_parts([&](int64_t first, int64_t rows) {
        read_part(x + plane * in, count, first, rows, x + p_.outer * in);
        const int64_t at = first * p_.out[2] * kWidth;
        if (places == nullptr)
          reduce_axis<MaxOf<A>>(reach_[2], rows, 1, part_.data(), map + at);
        else
          reduce_axis_places<A, I>(reach_[2], 1, rows, 1, part_.data(), nullptr, map + at,
                                   map_places + at);
      });
      if (places == nullptr)
        map = reduce_rest<MaxOf<A>>();
      else
        map = reduce_rest_places(map_places);
      write_planes<kWidth>(
          count, out, out, [&](int64_t at) { return load_lanes(map + at * kWidth); },
          [&](Vec<A> value, int64_t at, int64_t width) {
            store_before(y + end * out, y + plane * out + at, value, width);
          });
      if (places == nullptr) continue;
      write_planes<kWidth>(
          count, out, out, [&](int64_t at) { return load_lanes(map_places + at * kWidth); },
          [&](Vec<I> value, int64_t at, int64_t width) {
            using Narrow = typename vector_of<Place, kWidth>::type;
            const Narrow kept = __builtin_convertvector(value, Narrow);
            Place* to = places + plane * out + at;
            if (to + kWidth <= places + end * out) {
              memcpy(to, &kept, sizeof(kept));
            } else {
              memcpy(to, &kept, width * sizeof(Place));
            }
          });
    }
  }

 private:
  // Positions of the largest map that is held whole, between the axes.
  int64_t most_positions() const { return reach_[0].most() * reach_[1].most() * p_.out[2]; }

  // Calls body(first row, rows) for the parts of the inputs' map.
  template <class Body>
  WEFT_INLINE void for_parts(const Body& body) const {
    for (int64_t part = 0; part < parts_.count; ++part)
      body(parts_.begin(part), parts_.begin(part + 1) - parts_.begin(part));
  }

  void read_part(const T* planes, int64_t count, int64_t first, int64_t rows, const T* end) {
    A* part = part_.data();
    read_planes(planes + first * p_.in[2], count, p_.in_positions(), rows * p_.in[2], end,
                [&](int64_t at, Vec<A> value) { store_lanes(part + at * kWidth, value); });
  }

  // The axes H and D of the map; returns where the result lies.
  template <class Op>
  A* reduce_rest() {
    A *map = map_.data(), *next = spare_.data();
    if (!reach_[1].identity) {
      reduce_axis<Op>(reach_[1], p_.in[0], p_.out[2], map, next);
      std::swap(map, next);
    }
    if (!reach_[0].identity) {
      reduce_axis<Op>(reach_[0], 1, p_.out[1] * p_.out[2], map, next);
      std::swap(map, next);
    }
    return map;
  }
  A* reduce_rest_places(I*& map_places) {
    A *map = map_.data(), *next = spare_.data();
    I* next_places = spare_places_.data();
    map_places = map_places_.data();
    const int64_t columns = p_.window[2].size;
    if (!reach_[1].identity) {
      reduce_axis_places(reach_[1], columns, p_.in[0], p_.out[2], map, map_places, next,
                         next_places);
      std::swap(map, next);
      std::swap(map_places, next_places);
    }
    if (!reach_[0].identity) {
      reduce_axis_places(reach_[0], p_.window[1].size * columns, 1, p_.out[1] * p_.out[2], map,
                         map_places, next, next_places);
      std::swap(map, next);
      std::swap(map_places, next_places);
    }
    return map;
  }
  // Backward: the axes D and H.
  A* spread_rest() {
    A *map = map_.data(), *next = spare_.data();
    if (!reach_[0].identity) {
      reduce_axis<SumOf<T>>(reach_[0], 1, p_.out[1] * p_.out[2], map, next);
      std::swap(map, next);
    }
    if (!reach_[1].identity) {
      reduce_axis<SumOf<T>>(reach_[1], p_.in[0], p_.out[2], map, next);
      std::swap(map, next);
    }
    return map;
  }

  const PoolProblem& p_;
  const Reach reach_[3];
  const Parts parts_;
  Scratch<A> part_;         // inputs of a part
  Scratch<A> map_, spare_;  // whole maps, between the axes
  Scratch<I> map_places_, spare_places_;
};

// Calls body(begin, end) for runs of planes that fill vectors, but for the last.
template <class T, class Body>
void parallel_planes(const PoolProblem& p, const Context& context, const Body& body) {
  const int64_t groups = ceil_div(p.outer, kLanes<T>);
  parallel_for(context, groups, pool_grain(groups, p.in_elements() + p.out_elements()),
               [&](int64_t begin, int64_t end) {
                 end *= kLanes<T>;
                 body(begin * kLanes<T>, end < p.outer ? end : p.outer);
               });
}

}  // namespace

void max_forward_in_lanes(const PoolProblem& p, const void* x, void* y, void* places,
                          const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_place(p, [&](auto place) {
      auto* kept = static_cast<decltype(place)*>(places);
      parallel_planes<T>(p, context, [&](int64_t begin, int64_t end) {
        LaneWalk<T>(p, false, kept != nullptr)
            .maximum(static_cast<const T*>(x), static_cast<T*>(y), kept, begin, end);
      });
    });
  });
}

void avg_forward_in_lanes(const PoolProblem& p, const void* x, void* y, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_planes<T>(p, context, [&](int64_t begin, int64_t end) {
      LaneWalk<T>(p, false, false)
          .average(static_cast<const T*>(x), static_cast<T*>(y), begin, end);
    });
  });
}

void avg_backward_in_lanes(const PoolProblem& p, const void* gy, void* gx, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_planes<T>(p, context, [&](int64_t begin, int64_t end) {
      LaneWalk<T>(p, true, false)
          .average_gradient(static_cast<const T*>(gy), static_cast<T*>(gx), begin, end);
    });
  });
}

}  // namespace weft::WEFT_TARGET
