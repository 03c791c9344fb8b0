// Random masks on CUDA: a thread draws one of SplitMix64's numbers (mask_cpu.cpp), which is two
// elements. The seed stays on the device, so a captured graph can be given another. Bound: bytes.
#include "device/index.h"
#include "rnn/mask.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
WEFT_GLOBAL void random_mask(const int64_t* seed, uint64_t threshold, int64_t count, T* out) {
  const int64_t index = device::global_thread();
  if (2 * index >= count) return;
  uint64_t z = static_cast<uint64_t>(device::load(seed)) +
               (static_cast<uint64_t>(index) + 1) * uint64_t{0x9E3779B97F4A7C15};
  z = (z ^ (z >> 30)) * uint64_t{0xBF58476D1CE4E5B9};
  z = (z ^ (z >> 27)) * uint64_t{0x94D049BB133111EB};
  z = z ^ (z >> 31);
  const auto drawn = [&](uint64_t half) { return narrow<T>(half < threshold ? 1.0f : 0.0f); };
  device::store(out + 2 * index, drawn(z & 0xFFFFFFFF));
  if (2 * index + 1 < count) device::store(out + 2 * index + 1, drawn(z >> 32));
}

void draw(const MaskProblem& p, const int64_t* seed, void* out, const Context& context) {
  constexpr int kThreads = 256;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    device::launch(
        {"random_mask", (p.count + 2 * kThreads - 1) / (2 * kThreads), kThreads, 0, context.stream},
        random_mask<T>, seed, p.threshold, p.count, static_cast<T*>(out));
  });
}

}  // namespace

const MaskKernels mask_kernels = {draw};

}  // namespace weft::WEFT_TARGET
