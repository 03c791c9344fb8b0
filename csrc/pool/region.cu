// Pooling over regions on CUDA: the window walk with a box per region.
//
// Forward: a thread owns one output and walks its bin. Neighbouring threads own neighbouring
// elements in memory: channels of a bin (channels-last), bins of a channel (contiguous). Bound:
// bytes, the outputs and the map, whose positions in several regions come from cache.
// Backward: a block owns a tile of the map, each thread one channel of it. It goes through the
// regions in order and adds the bins that meet the tile to sums in shared memory, each thread to
// its own, so nothing is atomic, nothing waits and the bits never change (torchvision's backward
// adds atomically). Bound: the regions' numbers, which each tile reads, and the bins that cross a
// tile's edge, which several read. A thread per input, which gathers, read each bin as often as it
// has positions.
#include <limits>

#include "device/device.h"
#include "pool/region.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = 256;

// An index into [outer, C, inner] or, channels-last, [outer, inner, C].
struct Element {
  int64_t outer, channel, inner;
};

WEFT_DEVICE Element split(const RegionProblem& p, int64_t flat, int64_t inner) {
  if (p.channels_last)
    return {flat / (p.channels * inner), flat % p.channels, flat / p.channels % inner};
  return {flat / (p.channels * inner), flat / inner % p.channels, flat % inner};
}

WEFT_DEVICE int64_t global_thread() {
  return device::block_index() * device::block_size() + device::thread_index();
}

WEFT_DEVICE Region read_region(const RegionProblem& p, const int64_t* regions, int64_t index) {
  const int64_t* r = regions + index * kRegionNumbers;
  return make_region(p, load(r), load(r + 1), load(r + 2), load(r + 3), load(r + 4));
}

struct Box {
  Range rows, columns;
};

WEFT_DEVICE Box bin_of(const RegionProblem& p, const Region& region, int64_t bin) {
  return {bin_range(region.begin[0], region.extent[0], p.out[0], bin / p.out[1], p.in[0]),
          bin_range(region.begin[1], region.extent[1], p.out[1], bin % p.out[1], p.in[1])};
}

WEFT_DEVICE Range common(const Range& a, const Range& b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

template <class T, bool kKeepPlaces>
WEFT_GLOBAL WEFT_HOT void region_max_forward(RegionProblem p, const T* x, const int64_t* regions,
                                             T* y, int32_t* places) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const Region region = read_region(p, regions, e.outer);
  const auto [rows, columns] = bin_of(p, region, e.inner);
  using Acc = accumulate_t<T>;
  Acc best = -std::numeric_limits<Acc>::infinity();
  int64_t place = -1;
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = columns.begin; w < columns.end; ++w) {
      const int64_t at = h * p.in[1] + w;
      const Acc value = widen(load(x + p.in_offset(region.image, e.channel, at)));
      if (value > best || value != value || place < 0) {
        best = value;
        place = at;
      }
    }
  store(y + index, narrow<T>(place < 0 ? Acc{0} : best));
  if constexpr (kKeepPlaces) store(places + index, static_cast<int32_t>(place));
}

// ---- backward: tiles of the map --------------------------------------------------------------

constexpr int kTileSide = 8;
constexpr int kTilePositions = kTileSide * kTileSide;
constexpr int kTileThreads = 128;

// The part of the map that a thread owns, and its sums.
template <class Acc>
class Tile {
 public:
  WEFT_DEVICE explicit Tile(const RegionProblem& p)
      : sums_(shared_.take<Acc>(kTilePositions * device::block_size()) + device::thread_index()) {
    int64_t index = device::block_index();
    const int64_t columns = ceil_div(p.in[1], kTileSide);
    const int64_t rows = ceil_div(p.in[0], kTileSide);
    const int64_t channels = ceil_div(p.channels, device::block_size());
    span[1] = part(index % columns, p.in[1]);
    index /= columns;
    span[0] = part(index % rows, p.in[0]);
    index /= rows;
    channel = index % channels * device::block_size() + device::thread_index();
    image = index / channels;
    for (int i = 0; i < kTilePositions; ++i) sums_[i * device::block_size()] = 0;
  }

  WEFT_DEVICE bool holds(int64_t h, int64_t w) const {
    return h >= span[0].begin && h < span[0].end && w >= span[1].begin && w < span[1].end;
  }
  WEFT_DEVICE Acc& at(int64_t h, int64_t w) {
    return sums_[((h - span[0].begin) * kTileSide + w - span[1].begin) * device::block_size()];
  }
  template <class T>
  WEFT_DEVICE void write(const RegionProblem& p, T* gx) {
    for (int64_t h = span[0].begin; h < span[0].end; ++h)
      for (int64_t w = span[1].begin; w < span[1].end; ++w)
        store(gx + p.in_offset(image, channel, h * p.in[1] + w), narrow<T>(at(h, w)));
  }

  int64_t image;
  int64_t channel;
  Range span[2];  // rows, columns

 private:
  static WEFT_DEVICE Range part(int64_t index, int64_t extent) {
    const int64_t begin = index * kTileSide;
    return {begin, begin + kTileSide < extent ? begin + kTileSide : extent};
  }

  device::SharedMemory shared_;
  Acc* sums_;
};

// Calls `add(region, output, bin)` for each bin that meets the tile, regions and bins in order.
template <class Acc, class Add>
WEFT_DEVICE void for_each_bin(const RegionProblem& p, const int64_t* regions, const Tile<Acc>& tile,
                              const Add& add) {
  for (int64_t k = 0; k < p.regions; ++k) {
    const Region region = read_region(p, regions, k);
    if (region.image != tile.image) continue;
    const Range rows = bins_meeting(region.begin[0], region.extent[0], p.out[0], tile.span[0]);
    const Range columns = bins_meeting(region.begin[1], region.extent[1], p.out[1], tile.span[1]);
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        const int64_t bin = i * p.out[1] + j;
        add(region, p.out_offset(k, tile.channel, bin), bin);
      }
  }
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_max_backward(RegionProblem p, const T* gy, const int64_t* regions,
                                              const int32_t* places, T* gx) {
  Tile<accumulate_t<T>> tile(p);
  if (tile.channel >= p.channels) return;
  for_each_bin(p, regions, tile, [&](const Region&, int64_t output, int64_t) {
    const int32_t place = load(places + output);
    if (place < 0) return;
    const auto width = static_cast<int32_t>(p.in[1]);
    const int32_t h = place / width;
    const int32_t w = place % width;
    if (tile.holds(h, w)) tile.at(h, w) += widen(load(gy + output));
  });
  tile.write(p, gx);
}

template <class T>
WEFT_GLOBAL void region_max_pick(RegionProblem p, const T* x, const int64_t* regions,
                                 const int32_t* places, T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const int64_t image = read_region(p, regions, e.outer).image;
  const int32_t place = load(places + index);
  const bool inside = place >= 0 && place < p.in_positions();
  store(y + index, inside ? load(x + p.in_offset(image, e.channel, place)) : T{});
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_avg_forward(RegionProblem p, const T* x, const int64_t* regions,
                                             T* y) {
  const int64_t index = global_thread();
  if (index >= p.out_elements()) return;
  const Element e = split(p, index, p.bins());
  const Region region = read_region(p, regions, e.outer);
  const auto [rows, columns] = bin_of(p, region, e.inner);
  using Acc = accumulate_t<T>;
  Acc sum = 0;
  for (int64_t h = rows.begin; h < rows.end; ++h) {
    Acc row = 0;  // a sum of sums loses fewer bits than one long sum
    for (int64_t w = columns.begin; w < columns.end; ++w)
      row += widen(load(x + p.in_offset(region.image, e.channel, h * p.in[1] + w)));
    sum += row;
  }
  const int64_t count = area(rows, columns);
  store(y + index, narrow<T>(count == 0 ? Acc{0} : sum / static_cast<Acc>(count)));
}

template <class T>
WEFT_GLOBAL WEFT_HOT void region_avg_backward(RegionProblem p, const T* gy, const int64_t* regions,
                                              T* gx) {
  using Acc = accumulate_t<T>;
  Tile<Acc> tile(p);
  if (tile.channel >= p.channels) return;
  for_each_bin(p, regions, tile, [&](const Region& region, int64_t output, int64_t bin) {
    const Box box = bin_of(p, region, bin);
    const Range rows = common(box.rows, tile.span[0]);
    const Range columns = common(box.columns, tile.span[1]);
    if (area(rows, columns) == 0) return;
    const Acc gradient = widen(load(gy + output)) / static_cast<Acc>(area(box.rows, box.columns));
    for (int64_t h = rows.begin; h < rows.end; ++h)
      for (int64_t w = columns.begin; w < columns.end; ++w) tile.at(h, w) += gradient;
  });
  tile.write(p, gx);
}

// ---- launchers -------------------------------------------------------------------------------

template <class Acc>
device::Launch one_block_per_tile(const char* kernel, const RegionProblem& p,
                                  const Context& context) {
  const int64_t warps = ceil_div(p.channels < kTileThreads ? p.channels : kTileThreads, 32);
  const int threads = static_cast<int>(warps * 32);
  const int64_t tiles = ceil_div(p.in[0], kTileSide) * ceil_div(p.in[1], kTileSide);
  return {kernel, p.images * ceil_div(p.channels, threads) * tiles, threads,
          static_cast<int64_t>(sizeof(Acc)) * kTilePositions * threads, context.stream};
}

device::Launch one_thread_each(const char* kernel, int64_t elements, const Context& context) {
  return {kernel, ceil_div(elements, kThreads), kThreads, 0, context.stream};
}

void launch_max_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                        int32_t* places, const Context& context) {
  const auto config = one_thread_each("region_max_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config,
                   places == nullptr ? region_max_forward<T, false> : region_max_forward<T, true>,
                   p, static_cast<const T*>(x), regions, static_cast<T*>(y), places);
  });
}

void launch_max_backward(const RegionProblem& p, const void* gy, const int64_t* regions,
                         const int32_t* places, void* gx, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto config = one_block_per_tile<accumulate_t<T>>("region_max_backward", p, context);
    device::launch(config, region_max_backward<T>, p, static_cast<const T*>(gy), regions, places,
                   static_cast<T*>(gx));
  });
}

void launch_max_pick(const RegionProblem& p, const void* x, const int64_t* regions,
                     const int32_t* places, void* y, const Context& context) {
  const auto config = one_thread_each("region_max_pick", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_max_pick<T>, p, static_cast<const T*>(x), regions, places,
                   static_cast<T*>(y));
  });
}

void launch_avg_forward(const RegionProblem& p, const void* x, const int64_t* regions, void* y,
                        const Context& context) {
  const auto config = one_thread_each("region_avg_forward", p.out_elements(), context);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(config, region_avg_forward<T>, p, static_cast<const T*>(x), regions,
                   static_cast<T*>(y));
  });
}

void launch_avg_backward(const RegionProblem& p, const void* gy, const int64_t* regions, void* gx,
                         const Context& context) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto config = one_block_per_tile<accumulate_t<T>>("region_avg_backward", p, context);
    device::launch(config, region_avg_backward<T>, p, static_cast<const T*>(gy), regions,
                   static_cast<T*>(gx));
  });
}

}  // namespace

const RegionKernels region_kernels = {
    .reads_channels_last = false,
    .max_forward = launch_max_forward,
    .max_backward = launch_max_backward,
    .max_pick = launch_max_pick,
    .avg_forward = launch_avg_forward,
    .avg_backward = launch_avg_backward,
};

}  // namespace weft::WEFT_TARGET
