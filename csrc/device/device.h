// The device vocabulary: the only words CUDA kernels are written in.
//
// A `.cu` file compiles two ways. Under nvcc each word is the hardware's own instruction
// (device/cuda.h). Under g++ each word is executed on the CPU, one fiber per CUDA thread
// (device/host.h), strictly: what hardware forgives silently is an error there. Nothing in a kernel
// asks which of the two it is.
//
//   WEFT_GLOBAL void kernel(...)         a kernel; blocks and grids are one-dimensional
//   WEFT_GLOBAL WEFT_HOT void kernel(...)  one that must not spill: `make kernels` fails if it does
//   WEFT_UNROLL WEFT_UNROLL_BY(4)        before a loop: unrolled; what it indexes is in registers
//   launch({name, blocks, threads, shared_bytes, stream}, kernel, args...)
//                                        non-const pointer arguments are the kernel's outputs
//   thread_index() block_size() block_index() grid_size() lane()
//   SharedMemory shared;                 the block's shared memory ...
//   T* tile = shared.take<T>(count);     ... handed out piece by piece, 16-byte aligned; more by
//                                        take<T, 1024>, which may cost 1008 bytes
//   barrier()                            all threads of the block
//   shuffle(v, lane) shuffle_xor(v, mask) shuffle_down(v, delta) shuffle_up(v, delta)
//   ballot(p) any(p) all(p)              all 32 lanes of a warp
//   load(p) load_pack<N>(p) store(p, v) store(p, pack)
//                                        global memory; a pack is 2, 4, 8 or 16 bytes, aligned
//   cp_async<Bytes>(shared, global) cp_async_commit() cp_async_wait<Pending>()
//                                        4-, 8- or 16-byte copies that land at the wait
//   cp_async_or_zero<Bytes>(shared, global, inside)   zeros unless inside; nothing is read then
//   ldmatrix mma to_tf32                 tensor cores: device/mma.h
//   blocks that wait for each other      device/grid.h, device/cluster.h
//   MBarrier tma_load wgmma              what Hopper alone has: device/hopper.h
//
// There are no atomics: every weft kernel gives the same bits on every run.
#pragma once

#include "core/dtype.h"
#include "device/grid_facts.h"

// Read by benchmarks/kernel_report.py in the source.
#define WEFT_HOT

namespace weft::device {

// N neighbouring elements that move in one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "a pack is at most 16 bytes wide");
  T value[N];
  WEFT_HD T& operator[](int i) { return value[i]; }
  WEFT_HD const T& operator[](int i) const { return value[i]; }
};

struct Launch {
  const char* kernel;  // the name that errors and reports use
  int64_t blocks;
  int threads;  // per block, a multiple of 32
  int64_t shared_bytes = 0;
  void* stream = nullptr;
  bool cooperative = false;  // all blocks run at once and may wait for each other: device/grid.h
  int cluster = 1;           // neighbouring blocks that reach each other's shared memory
};

}  // namespace weft::device

#if defined(__CUDACC__)
#include "device/cuda.h"
#define WEFT_TARGET cuda
#else
#include "device/host.h"
#define WEFT_TARGET cuda_on_host
#endif
