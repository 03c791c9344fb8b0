// Proof of the device vocabulary: kernels whose results are known, one per word.
#pragma once

#include <cstdint>

#include "core/context.h"

namespace weft {

// `in` and `out` are `bytes` long; how a word reads them stands at its kernel. False: no such word.
struct SelftestKernels {
  bool (*run)(const char* word, const void* in, void* out, int64_t bytes, const Context&);
};

// selftest.cu: each word used as it should be, on hardware and on the host.
WEFT_DECLARE_CUDA_KERNEL_TABLES(SelftestKernels, selftest_kernels)
// selftest_mma.cu: the words of device/mma.h.
WEFT_DECLARE_CUDA_KERNEL_TABLES(SelftestKernels, mma_selftest_kernels)
// selftest_blocks.cu: the same of the words by which blocks meet.
WEFT_DECLARE_CUDA_KERNEL_TABLES(SelftestKernels, block_selftest_kernels)
// selftest_hopper.cu: the words of device/hopper.h; numbers may follow a word's name.
WEFT_DECLARE_CUDA_KERNEL_TABLES(SelftestKernels, hopper_selftest_kernels)
// faults.cpp, faults_hopper.cpp: each fault that host execution promises to catch, planted; on the
// host alone.
WEFT_DECLARE_HOST_KERNEL_TABLES(SelftestKernels, fault_kernels)
WEFT_DECLARE_HOST_KERNEL_TABLES(SelftestKernels, hopper_fault_kernels)

}  // namespace weft
