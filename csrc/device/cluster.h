// Clusters: neighbouring blocks that run at once and reach each other's shared memory (sm_90 on).
//
//   cluster_size() cluster_rank()   how many blocks; which of them this is
//   cluster_barrier()               all threads of all blocks of the cluster
//   T* other = at_rank(tile, rank)  the piece of shared memory that block `rank` took in the place
//   of
//                                   this block's `tile`
//
// A cluster meets once before blocks look into each other's memory, so that all have started, and
// once before any of them ends, since its memory ends with it. `Launch::cluster` is at most 8.
#pragma once

#include "device/device.h"

namespace weft::device {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

WEFT_DEVICE int cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return static_cast<int>(size);
}
WEFT_DEVICE int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
}
WEFT_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
template <class T>
WEFT_DEVICE T* at_rank(T* shared, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
}

#else  // launches of clusters are refused on such a device before a kernel starts

WEFT_DEVICE int cluster_size() { return 1; }
WEFT_DEVICE int cluster_rank() { return 0; }
WEFT_DEVICE void cluster_barrier() { barrier(); }
template <class T>
WEFT_DEVICE T* at_rank(T* shared, int) {
  return shared;
}

#endif

#else

inline int cluster_size() { return host::cluster_size(); }
inline int cluster_rank() { return static_cast<int>(block_index() % cluster_size()); }
inline void cluster_barrier(host::Site site = host::Site::current()) {
  host::cluster_barrier(site);
}
template <class T>
T* at_rank(T* shared, int rank) {
  return static_cast<T*>(host::at_rank(shared, rank));
}

#endif

}  // namespace weft::device
