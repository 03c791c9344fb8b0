// Where a kernel runs: the build target that was chosen for it, and the resources it may use.
#pragma once

#include <cstdint>

namespace weft {

// Every kernel source is compiled once per target that it serves and defines the same table of
// functions in a namespace of the target's name (`weft::avx512::pool_kernels`, ...).
// `cuda_on_host` is the CUDA source executed on the CPU, see device/device.h.
enum class Target : uint8_t { baseline, avx2, avx512, cuda, cuda_on_host };

struct Context {
  int threads = 1;            // CPU targets: how many threads may be used
  bool sm90a = false;         // cuda: kernels of Hopper's own words may be chosen
  void* stream = nullptr;     // cuda: the cudaStream_t to launch on
  void* workspace = nullptr;  // of kernels that ask for one, for the time of the call
};

}  // namespace weft

// Declares, for a family, one table of kernels per target that this build holds, and
// `const Table* <name>_for(Target)`, which is null for a target that is not built in.
#if WEFT_X86
#define WEFT_DECLARE_X86_TABLES(Table, name) \
  namespace avx2 {                           \
  extern const Table name;                   \
  }                                          \
  namespace avx512 {                         \
  extern const Table name;                   \
  }
#define WEFT_CASE_X86(name) \
  case Target::avx2:        \
    return &avx2::name;     \
  case Target::avx512:      \
    return &avx512::name;
#else
#define WEFT_DECLARE_X86_TABLES(Table, name)
#define WEFT_CASE_X86(name)
#endif

#if WEFT_WITH_CUDA
#define WEFT_DECLARE_CUDA_TABLE(Table, name) \
  namespace cuda {                           \
  extern const Table name;                   \
  }
#define WEFT_CASE_CUDA(name) \
  case Target::cuda:         \
    return &cuda::name;
#else
#define WEFT_DECLARE_CUDA_TABLE(Table, name)
#define WEFT_CASE_CUDA(name)
#endif

#if WEFT_WITH_HOST_EXECUTION
#define WEFT_DECLARE_HOST_TABLE(Table, name) \
  namespace cuda_on_host {                   \
  extern const Table name;                   \
  }
#define WEFT_CASE_HOST(name) \
  case Target::cuda_on_host: \
    return &cuda_on_host::name;
#else
#define WEFT_DECLARE_HOST_TABLE(Table, name)
#define WEFT_CASE_HOST(name)
#endif

#define WEFT_DECLARE_KERNEL_TABLES(Table, name)                    \
  namespace baseline {                                             \
  extern const Table name;                                         \
  }                                                                \
  WEFT_DECLARE_X86_TABLES(Table, name)                             \
  WEFT_DECLARE_CUDA_TABLE(Table, name)                             \
  WEFT_DECLARE_HOST_TABLE(Table, name)                             \
  [[maybe_unused]] static const Table* name##_for(Target target) { \
    switch (target) {                                              \
      case Target::baseline:                                       \
        return &baseline::name;                                    \
        WEFT_CASE_X86(name)                                        \
        WEFT_CASE_CUDA(name)                                       \
        WEFT_CASE_HOST(name)                                       \
      default:                                                     \
        return nullptr;                                            \
    }                                                              \
  }

// The same for a family that serves CPU targets alone.
#define WEFT_DECLARE_CPU_KERNEL_TABLES(Table, name)                \
  namespace baseline {                                             \
  extern const Table name;                                         \
  }                                                                \
  WEFT_DECLARE_X86_TABLES(Table, name)                             \
  [[maybe_unused]] static const Table* name##_for(Target target) { \
    switch (target) {                                              \
      case Target::baseline:                                       \
        return &baseline::name;                                    \
        WEFT_CASE_X86(name)                                        \
      default:                                                     \
        return nullptr;                                            \
    }                                                              \
  }

// The same for CUDA source alone, and for host execution alone.
#define WEFT_DECLARE_CUDA_KERNEL_TABLES(Table, name)               \
  WEFT_DECLARE_CUDA_TABLE(Table, name)                             \
  WEFT_DECLARE_HOST_TABLE(Table, name)                             \
  [[maybe_unused]] static const Table* name##_for(Target target) { \
    switch (target) {                                              \
      WEFT_CASE_CUDA(name)                                         \
      WEFT_CASE_HOST(name)                                         \
      default:                                                     \
        return nullptr;                                            \
    }                                                              \
  }
#define WEFT_DECLARE_HOST_KERNEL_TABLES(Table, name)               \
  WEFT_DECLARE_HOST_TABLE(Table, name)                             \
  [[maybe_unused]] static const Table* name##_for(Target target) { \
    switch (target) {                                              \
      WEFT_CASE_HOST(name)                                         \
      default:                                                     \
        return nullptr;                                            \
    }                                                              \
  }
