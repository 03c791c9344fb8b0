// Signs of an activated map on CUDA: a thread owns a byte of them, which is eight elements, loaded
// and stored 16 bytes at a time where no row ends inside a byte. Bound: bytes.
#include "block/block.h"
#include "device/index.h"

namespace weft::WEFT_TARGET {
namespace {

using device::load;
using device::store;

constexpr int kThreads = 256;
constexpr int kBits = 8;
template <class T>
constexpr int kPack = kBits * sizeof(T) < 16 ? kBits : 16 / sizeof(T);

// The elements of one byte of signs.
struct Bits {
  int64_t first;
  int count;
};

template <bool kPacked>
WEFT_DEVICE Bits bits_of(const SignRows& r, int64_t byte) {
  if constexpr (kPacked) return {byte * kBits, kBits};
  const int64_t begin = byte % r.bytes() * kBits, left = r.length - begin;
  return {byte / r.bytes() * r.length + begin, left < kBits ? static_cast<int>(left) : kBits};
}

// Calls `body(i, value)` for each element; what it returns is stored if `kStores`.
template <bool kPacked, bool kStores, class Map, class Body>
WEFT_DEVICE void each(Map* map, const Bits& bits, const Body& body) {
  using T = std::remove_const_t<Map>;
  if constexpr (kPacked) {
    WEFT_UNROLL
    for (int i = 0; i < kBits; i += kPack<T>) {
      auto pack = device::load_pack<kPack<T>>(map + bits.first + i);
      WEFT_UNROLL
      for (int j = 0; j < kPack<T>; ++j) pack[j] = body(i + j, pack[j]);
      if constexpr (kStores) store(map + bits.first + i, pack);
    }
  } else {
    for (int i = 0; i < bits.count; ++i) {
      const T value = body(i, load(map + bits.first + i));
      if constexpr (kStores) store(map + bits.first + i, value);
    }
  }
}

template <class T, bool kPacked>
WEFT_GLOBAL void keep_signs(SignRows r, const T* y, uint8_t* signs) {
  const int64_t byte = device::global_thread();
  if (byte >= r.rows * r.bytes()) return;
  const bool relu = r.activation == Activation::relu;
  unsigned found = 0;
  each<kPacked, false>(y, bits_of<kPacked>(r, byte), [&](int i, T element) {
    const auto value = widen(element);
    // NaN lets the gradient pass relu, as torch does.
    found |= static_cast<unsigned>(relu ? !(value <= 0) : value > 0) << i;
    return element;
  });
  store(signs + byte, static_cast<uint8_t>(found));
}

template <class T, bool kPacked>
WEFT_GLOBAL void pass_signs(SignRows r, const uint8_t* signs, T* grad) {
  const int64_t byte = device::global_thread();
  if (byte >= r.rows * r.bytes()) return;
  const bool relu = r.activation == Activation::relu;
  const auto slope = static_cast<accumulate_t<T>>(r.slope);
  const unsigned passes = load(signs + byte);
  each<kPacked, true>(grad, bits_of<kPacked>(r, byte), [&](int i, T element) {
    if (passes >> i & 1) return element;
    return narrow<T>(relu ? accumulate_t<T>{0} : widen(element) * slope);
  });
}

// Calls `body(T, whether rows end between bytes, the launch)`.
template <class Body>
void for_kernel(const char* name, const SignRows& r, const void* map, const Context& context,
                const Body& body) {
  const int64_t blocks = (r.rows * r.bytes() + kThreads - 1) / kThreads;
  const device::Launch launch{name, blocks, kThreads, 0, context.stream};
  const bool packed = r.length % kBits == 0 && reinterpret_cast<uintptr_t>(map) % 16 == 0;
  dispatch_dtype(r.dtype, [&](auto tag) {
    if (packed)
      body(tag, std::true_type{}, launch);
    else
      body(tag, std::false_type{}, launch);
  });
}

void keep(const SignRows& r, const void* y, uint8_t* signs, const Context& context) {
  for_kernel("keep_signs", r, y, context, [&](auto tag, auto packed, const auto& launch) {
    using T = typename decltype(tag)::type;
    device::launch(launch, keep_signs<T, packed.value>, r, static_cast<const T*>(y), signs);
  });
}

void pass(const SignRows& r, const uint8_t* signs, void* grad, const Context& context) {
  for_kernel("pass_signs", r, grad, context, [&](auto tag, auto packed, const auto& launch) {
    using T = typename decltype(tag)::type;
    device::launch(launch, pass_signs<T, packed.value>, r, signs, static_cast<T*>(grad));
  });
}

}  // namespace

const BlockKernels block_kernels = {keep, pass};

}  // namespace weft::WEFT_TARGET
