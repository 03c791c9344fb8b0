// Pooling over regions on CPU.
//
// Forward: a thread owns some channels of some regions and walks each bin over vectors of channels,
// so x is channels-last: the positions of a bin are short runs of W, of all lengths, but each one
// holds C channels in a row (along W, the lanes of a vector would mostly be idle). Output that is
// contiguous is staged a region at a time and turned round. Bound: a load, a compare and two
// selects for each vector of each bin, from the cache that holds the map.
// Backward: a thread owns some channels of an image and adds the gradients of its regions, in
// order, into planes of accumulators, so that each input's sum is the same for any number of
// threads, and half types are rounded once.
#include <limits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/simd.h"
#include "pool/region.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kVectors = 4;  // of channels, in registers at once
template <class T>
constexpr int64_t kChannels = kVectors * kLanes<T>;  // that one thread takes at once
constexpr int64_t kGrainElements = 8192;

// Positions in the lanes of the values that they belong to.
template <class A>
using Places = typename vector_of<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>::type;

WEFT_INLINE Region read_region(const RegionProblem& p, const int64_t* regions, int64_t index) {
  const int64_t* r = regions + index * kRegionNumbers;
  return make_region(p, r[0], r[1], r[2], r[3], r[4]);
}

struct Box {
  Range rows, columns;
};

WEFT_INLINE Box bin_of(const RegionProblem& p, const Region& region, int64_t bin) {
  return {bin_range(region.begin[0], region.extent[0], p.out[0], bin / p.out[1], p.in[0]),
          bin_range(region.begin[1], region.extent[1], p.out[1], bin % p.out[1], p.in[1])};
}

template <class T>
WEFT_INLINE auto load_lanes(const T* address, int64_t count) {
  return count >= kLanes<T> ? load_vec(address) : load_part(address, static_cast<int>(count));
}

template <class T, class V>
WEFT_INLINE void store_lanes(T* address, V value, int64_t count) {
  if (count >= kLanes<T>)
    store_vec(address, value);
  else
    store_part(address, value, static_cast<int>(count));
}

WEFT_INLINE void store_lanes(int32_t* address, Vec<int32_t> places, int64_t count) {
  constexpr int64_t kAll = kVectorBytes / sizeof(int32_t);
  memcpy(address, &places, (count < kAll ? count : kAll) * sizeof(int32_t));
}
WEFT_INLINE void store_lanes(int32_t* address, Vec<int64_t> places, int64_t count) {
  constexpr int kAll = kVectorBytes / sizeof(int64_t);
  const auto narrowed = __builtin_convertvector(places, vector_of<int32_t, kAll>::type);
  memcpy(address, &narrowed, (count < kAll ? count : kAll) * sizeof(int32_t));
}

// What a forward kernel writes of one region and some of its channels: row `bin` of `values`, and
// of `places` unless that is null, holds those channels.
template <class T>
struct Rows {
  T* values;
  int32_t* places;
  int64_t pitch;
};

// The maxima of one bin, of N vectors of channels; x is at the image and the first channel.
struct Maximum {
  template <int N, class T>
  static WEFT_INLINE void reduce(const RegionProblem& p, const T* x, const Box& box, int64_t count,
                                 T* y, int32_t* places) {
    using A = accumulate_t<T>;
    using P = Places<A>;
    Vec<A> best[N];
    P place[N];
    const bool empty = area(box.rows, box.columns) == 0;
    const int64_t first = box.rows.begin * p.in[1] + box.columns.begin;
    for (int v = 0; v < N; ++v) {
      best[v] = Vec<A>{} + (empty ? A{0} : -std::numeric_limits<A>::infinity());
      place[v] = P{} + static_cast<int32_t>(empty ? -1 : first);
    }
    for (int64_t h = box.rows.begin; h < box.rows.end; ++h)
      for (int64_t w = box.columns.begin; w < box.columns.end; ++w) {
        const int64_t at = h * p.in[1] + w;
        for (int v = 0; v < N; ++v) {
          const int64_t lane = v * kLanes<T>;
          const Vec<A> value = load_lanes(x + at * p.channels + lane, count - lane);
          const auto larger = (value > best[v]) | (value != value);
          best[v] = larger ? value : best[v];
          place[v] = larger ? P{} + static_cast<int32_t>(at) : place[v];
        }
      }
    for (int v = 0; v < N; ++v) {
      const int64_t lane = v * kLanes<T>;
      store_lanes(y + lane, best[v], count - lane);
      if (places != nullptr) store_lanes(places + lane, place[v], count - lane);
    }
  }
};

struct Mean {
  template <int N, class T>
  static WEFT_INLINE void reduce(const RegionProblem& p, const T* x, const Box& box, int64_t count,
                                 T* y, int32_t*) {
    using A = accumulate_t<T>;
    Vec<A> sum[N] = {};
    for (int64_t h = box.rows.begin; h < box.rows.end; ++h) {
      Vec<A> row[N] = {};  // a sum of sums loses fewer bits than one long sum
      for (int64_t w = box.columns.begin; w < box.columns.end; ++w)
        for (int v = 0; v < N; ++v) {
          const int64_t lane = v * kLanes<T>;
          row[v] += load_lanes(x + (h * p.in[1] + w) * p.channels + lane, count - lane);
        }
      for (int v = 0; v < N; ++v) sum[v] += row[v];
    }
    const int64_t elements = area(box.rows, box.columns);
    const A divisor = static_cast<A>(elements == 0 ? 1 : elements);
    for (int v = 0; v < N; ++v) {
      const int64_t lane = v * kLanes<T>;
      store_lanes(y + lane, sum[v] / divisor, count - lane);
    }
  }
};

// All bins of one region, for channels [channel, channel + count).
template <class Op, class T>
void pool_region(const RegionProblem& p, const T* x, const Region& region, int64_t channel,
                 int64_t count, const Rows<T>& rows) {
  const T* from = x + region.image * p.in_positions() * p.channels + channel;
  for (int64_t bin = 0; bin < p.bins(); ++bin) {
    const Box box = bin_of(p, region, bin);
    T* y = rows.values + bin * rows.pitch;
    int32_t* places = rows.places == nullptr ? nullptr : rows.places + bin * rows.pitch;
    if (count == kChannels<T>) {
      Op::template reduce<kVectors>(p, from, box, kChannels<T>, y, places);
      continue;
    }
    for (int64_t c = 0; c < count; c += kLanes<T>)
      Op::template reduce<1>(p, from + c, box, count - c, y + c,
                             places == nullptr ? nullptr : places + c);
  }
}

// [bins, kChannels] -> [count, bins].
template <class T>
void turn_round(const T* staged, int64_t bins, int64_t count, T* out) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t bin = 0; bin < bins; ++bin) out[c * bins + bin] = staged[bin * kChannels<T> + c];
}

template <class Op, class T>
void forward(const RegionProblem& p, const T* x, const int64_t* regions, T* y, int32_t* places,
             const Context& context) {
  const int64_t blocks = ceil_div(p.channels, kChannels<T>);
  const int64_t grain = kGrainElements / (p.bins() * kChannels<T>);
  parallel_for(context, p.regions * blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t staged = p.channels_last ? 0 : p.bins() * kChannels<T>;
    Scratch<T> values(staged);
    Scratch<int32_t> kept(places == nullptr ? 0 : staged);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / blocks;
      const int64_t channel = item % blocks * kChannels<T>;
      const int64_t left = p.channels - channel;
      const int64_t count = left < kChannels<T> ? left : kChannels<T>;
      const int64_t offset = p.out_offset(k, channel, 0);
      const Region region = read_region(p, regions, k);
      if (p.channels_last) {
        int32_t* places_at = places == nullptr ? nullptr : places + offset;
        pool_region<Op>(p, x, region, channel, count, Rows<T>{y + offset, places_at, p.channels});
        continue;
      }
      int32_t* kept_at = places == nullptr ? nullptr : kept.data();
      pool_region<Op>(p, x, region, channel, count, Rows<T>{values.data(), kept_at, kChannels<T>});
      turn_round(values.data(), p.bins(), count, y + offset);
      if (places != nullptr)
        for (int64_t c = 0; c < count; ++c)
          for (int64_t bin = 0; bin < p.bins(); ++bin)
            places[offset + c * p.bins() + bin] = kept[bin * kChannels<T> + c];
    }
  });
}

// Where the gradients of one image's channels [channel, channel + count) are added up. The order of
// the axes is the one that the adding runs along, whatever that of gx.
template <class A>
struct Planes {
  A* sum;
  int64_t position_pitch;
  int64_t channel_pitch;

  A* at(int64_t position, int64_t c) const {
    return sum + position * position_pitch + c * channel_pitch;
  }
};

enum class Order { positions_inner, channels_inner };

// Calls `add(planes, region, k, channel, count)` for each region of each image and each part of the
// channels, regions in order; then writes the sums to gx.
template <Order kOrder, class T, class Add>
void backward(const RegionProblem& p, const int64_t* regions, T* gx, const Context& context,
              const Add& add) {
  using A = accumulate_t<T>;
  const int64_t positions = p.in_positions();
  const int64_t blocks = ceil_div(p.channels, kChannels<T>);
  parallel_for(context, p.images * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> sums(positions * (blocks > 1 ? kChannels<T> : p.channels));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / blocks;
      const int64_t channel = item % blocks * kChannels<T>;
      const int64_t left = p.channels - channel;
      const int64_t count = left < kChannels<T> ? left : kChannels<T>;
      Planes<A> planes = {sums.data(), 1, positions};
      if constexpr (kOrder == Order::channels_inner) planes = {sums.data(), count, 1};
      fill(sums.data(), positions * count, A{0});
      for (int64_t k = 0; k < p.regions; ++k) {
        const Region region = read_region(p, regions, k);
        if (region.image == image) add(planes, region, k, channel, count);
      }
      T* out = gx + p.in_offset(image, channel, 0);
      if (p.channels_last) {
        for (int64_t i = 0; i < positions; ++i)
          for (int64_t c = 0; c < count; ++c) out[i * p.channels + c] = narrow<T>(*planes.at(i, c));
      } else {
        for (int64_t c = 0; c < count; ++c)
          for (int64_t i = 0; i < positions; ++i)
            out[c * positions + i] = narrow<T>(*planes.at(i, c));
      }
    }
  });
}

void max_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                 int32_t* places, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<Maximum>(p, static_cast<const T*>(x), regions, static_cast<T*>(y), places, context);
  });
}

void avg_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                 const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<Mean>(p, static_cast<const T*>(x), regions, static_cast<T*>(y), nullptr, context);
  });
}

void max_backward(const RegionProblem& p, const void* gy, const int64_t* regions,
                  const int32_t* places, void* gx, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(gy);
    // Channel by channel: one plane stays in the nearest cache while it is added to.
    backward<Order::positions_inner>(
        p, regions, static_cast<T*>(gx), context,
        [&](const Planes<A>& planes, const Region&, int64_t k, int64_t channel, int64_t count) {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t bin = 0; bin < p.bins(); ++bin) {
              const int64_t output = p.out_offset(k, channel + c, bin);
              const int32_t place = places[output];
              if (place >= 0 && place < p.in_positions())
                *planes.at(place, c) += widen(from[output]);
            }
        });
  });
}

void avg_backward(const RegionProblem& p, const void* gy, const int64_t* regions, void* gx,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = accumulate_t<T>;
    const T* from = static_cast<const T*>(gy);
    backward<Order::channels_inner>(
        p, regions, static_cast<T*>(gx), context,
        [&](const Planes<A>& planes, const Region& region, int64_t k, int64_t channel,
            int64_t count) {
          A gradient[kChannels<T>];
          for (int64_t bin = 0; bin < p.bins(); ++bin) {
            const Box box = bin_of(p, region, bin);
            const A divisor = static_cast<A>(area(box.rows, box.columns));
            for (int64_t c = 0; c < count; ++c)
              gradient[c] = widen(from[p.out_offset(k, channel + c, bin)]) / divisor;
            for (int64_t h = box.rows.begin; h < box.rows.end; ++h)
              for (int64_t w = box.columns.begin; w < box.columns.end; ++w) {
                A* sum = planes.at(h * p.in[1] + w, 0);
                for (int64_t c = 0; c < count; ++c) sum[c] += gradient[c];
              }
          }
        });
  });
}

void max_pick(const RegionProblem& p, const void* x, const int64_t* regions, const int32_t* places,
              void* y, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    const int64_t one = p.channels * p.bins();
    parallel_for(context, p.regions, kGrainElements / one, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t image = read_region(p, regions, k).image;
        for (int64_t i = 0; i < one; ++i) {
          const int64_t channel = p.channels_last ? i % p.channels : i / p.bins();
          const int32_t place = places[k * one + i];
          const bool inside = place >= 0 && place < p.in_positions();
          to[k * one + i] = inside ? from[p.in_offset(image, channel, place)] : T{};
        }
      }
    });
  });
}

}  // namespace

const RegionKernels region_kernels = {
    .reads_channels_last = true,
    .max_forward = max_forward,
    .max_backward = max_backward,
    .max_pick = max_pick,
    .avg_forward = avg_forward,
    .avg_backward = avg_backward,
};

}  // namespace weft::WEFT_TARGET
