// Random masks on CPU: element i is one if a half of SplitMix64's number i / 2 (Steele, Lea and
// Flood 2014) is small enough.
//
// That generator's state is a counter, so elements are drawn in any order, by vectors and threads,
// with the same bits on every instruction set. Bound: its two multiplications of 64 bits. Lost:
// torch's bernoulli_, whose generator makes one number after the other, 4 ns each: it took as long
// as a small layer's forward.
#include "core/parallel.h"
#include "core/simd.h"
#include "rnn/mask.h"

namespace weft::WEFT_TARGET {
namespace {

constexpr int64_t kMaskGrain = 1 << 15;  // elements that are worth a thread

using Words = Vec<uint64_t>;
using Halves = Vec<uint32_t>;

// The numbers `first`, `first` + 1, ...
WEFT_INLINE Halves random_halves(uint64_t seed, uint64_t first) {
  Words z = {};
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<double>; ++i) z[i] = i;
  z = seed + (z + first + 1) * uint64_t{0x9E3779B97F4A7C15};
  z = (z ^ (z >> 30)) * uint64_t{0xBF58476D1CE4E5B9};
  z = (z ^ (z >> 27)) * uint64_t{0x94D049BB133111EB};
  z = z ^ (z >> 31);
  Halves halves;
  memcpy(&halves, &z, sizeof(halves));
  return halves;
}

WEFT_INLINE void store_lanes(double* out, Vec<float> value, int count) {
  for (int i = 0; i < count; ++i) out[i] = value[i];
}
template <class T>
WEFT_INLINE void store_lanes(T* out, Vec<float> value, int count) {
  if (count == kLanes<float>) return store_vec(out, value);
  store_part(out, value, count);
}

void draw(const MaskProblem& p, const int64_t* seed, void* out, const Context& context) {
  constexpr int kLane = kLanes<float>;
  dispatch_dtype(p.dtype, [&](auto tag) {
    auto* mask = static_cast<typename decltype(tag)::type*>(out);
    const Vec<float> one = Vec<float>{} + (p.threshold > 0 ? 1.0f : 0.0f);
    const Halves last = Halves{} + static_cast<uint32_t>(p.threshold - 1);
    parallel_for(context, (p.count + kLane - 1) / kLane, kMaskGrain / kLane,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t first = i * kLane, left = p.count - first;
                     const Halves found = random_halves(static_cast<uint64_t>(*seed), first / 2);
                     store_lanes(mask + first, found <= last ? one : Vec<float>{},
                                 static_cast<int>(left < kLane ? left : kLane));
                   }
                 });
  });
}

}  // namespace

const MaskKernels mask_kernels = {draw};

}  // namespace weft::WEFT_TARGET
