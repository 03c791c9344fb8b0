// Hopper's words executed on the CPU. See device/hopper.h; the work is done in hopper_host.cpp.
//
// Strict where hardware is silent: bytes of a copy land at the wait that sees its phase complete
// and are poison until then; sums are poison from the first wgmma on them to the wait after the
// last; operands of a wgmma are read when all 128 threads have come, and must not change until each
// warp has waited for it. A wait that can never end is reported when no thread can go on.
#pragma once

#include "device/hopper.h"

namespace weft::device {

// Host execution plays a small Hopper, so that small problems fill it.
inline int sm90a_multiprocessors() { return static_cast<int>(grid_facts().multiprocessors); }

struct TensorMap {
  TensorView tensor;
  bool windows = false;
  TileBox tile;
  WindowBox window;

  int64_t box_bytes() const {
    if (windows) return int64_t{kBoxRowBytes} * window.pixels;
    int64_t bytes = kBoxRowBytes;
    for (int a = 1; a < tensor.rank; ++a) bytes *= tile.extent[a];
    return bytes;
  }
};

inline TensorMap tensor_map(const TensorView& tensor, const TileBox& box) {
  check_map(tensor, box);
  return {tensor, false, box, {}};
}
inline TensorMap tensor_map(const TensorView& tensor, const WindowBox& box) {
  check_map(tensor, box);
  return {tensor, true, {}, box};
}

namespace host {

void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive(void* barrier, int64_t bytes);
void mbarrier_wait(void* barrier, int parity, const Site& site);

// coordinates: as many as the tensor's rank, fastest first; offsets: of windows alone.
void tma_load(void* shared, const TensorMap& map, void* barrier, const int* coordinates,
              const int* offsets);

// A product of this thread's warpgroup, a and b by rows of the reduction or of columns.
struct Wgmma {
  float* sums;
  int columns;
  const void* a;
  const void* b;
  Major major_a, major_b;
  float (*widen)(uint16_t bits);
};
void wgmma(const Wgmma& product, const Site& site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace host

class MBarrier {
 public:
  void init(int arrivals) { host::mbarrier_init(this, arrivals); }
  void arrive() { host::mbarrier_arrive(this, 0); }
  void arrive_expect(int bytes) { host::mbarrier_arrive(this, bytes); }
  void wait(int parity, host::Site site = host::Site::current()) {
    host::mbarrier_wait(this, parity, site);
  }

 private:
  uint64_t state_;
};

template <class... Coordinates>
void tma_load(void* shared, const TensorMap& map, MBarrier& barrier, Coordinates... coordinates) {
  const int at[] = {coordinates...};
  if (map.windows || static_cast<int>(sizeof...(coordinates)) != map.tensor.rank)
    host::fault("copies a box by another number of coordinates than its tensor map has");
  host::tma_load(shared, map, &barrier, at, nullptr);
}

template <int Rank>
void tma_load_im2col(void* shared, const TensorMap& map, MBarrier& barrier, const WindowAt& at) {
  static_assert(Rank >= 3 && Rank <= 5);
  if (!map.windows || Rank != map.tensor.rank)
    host::fault("copies windows by a tensor map of other rank or kind");
  int coordinates[Rank];
  coordinates[0] = at.channel;
  for (int a = 0; a < Rank - 2; ++a) coordinates[a + 1] = at.base[a];
  coordinates[Rank - 1] = at.image;
  host::tma_load(shared, map, &barrier, coordinates, at.offset);
}

// The host has one view of memory.
inline void fence_async() {}

template <int N>
void wgmma_fence(WgmmaSums<N>&) {
  host::wgmma_fence();
}

template <class T, Major kMajorB = Major::reduction, Major kMajorA = Major::reduction, int N>
void wgmma(WgmmaSums<N>& sums, const T* a, const T* b, host::Site site = host::Site::current()) {
  static_assert(kMajorB == Major::reduction || N % 64 == 0);
  host::wgmma({sums.value, N, a, b, kMajorA, kMajorB, [](uint16_t bits) { return widen(T{bits}); }},
              site);
}

inline void wgmma_commit() { host::wgmma_commit(); }

template <int Pending, int N>
void wgmma_wait(WgmmaSums<N>&) {
  static_assert(Pending >= 0 && Pending <= 7);
  host::wgmma_wait(Pending);
}

}  // namespace weft::device
