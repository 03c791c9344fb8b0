// What the kernels that prove the vocabulary share: their block size, and how one is launched.
#pragma once

#include <cstring>

#include "device/index.h"
#include "device/selftest.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int kThreads = 64;

// What `SelftestKernels::run` was given.
struct Word {
  const char* name;
  const void* in;
  void* out;
  int64_t bytes;
  const Context& context;

  bool is(const char* other) const { return strcmp(name, other) == 0; }

  // One thread per `per_thread` elements of the output.
  template <class In, class Out>
  bool launch(void (*kernel)(const In*, Out*), int per_thread = 1, int64_t shared_bytes = 0) const {
    const int64_t elements = bytes / static_cast<int64_t>(sizeof(Out));
    const device::Launch config{name, elements / per_thread / kThreads, kThreads, shared_bytes,
                                context.stream};
    device::launch(config, kernel, static_cast<const In*>(in), static_cast<Out*>(out));
    return true;
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
