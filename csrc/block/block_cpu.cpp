// Signs of an activated map on CPU: comparisons gathered into bytes and spread over vectors again.
//
// Both run on a map, or a part of one, that was just written. Bound: bytes, of the cache where that
// is.
#include "block/block_cpu.h"

#include <type_traits>

#include "conv/conv_gather.h"
#include "core/parallel.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
class Signs {
 public:
  using V = Vec<accumulate_t<T>>;

  explicit Signs(const SignRows& r)
      : relu_(r.activation == Activation::relu), slope_(static_cast<accumulate_t<T>>(r.slope)) {
    for (int i = 0; i < kLanes<T>; ++i) bit_[i] = Lane{1} << i;
  }

  void keep(const T* y, int64_t length, uint8_t* signs) const {
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) {
      Step bits = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kStep; v += kLanes<T>)
        bits |= static_cast<Step>(bits_of(load_vec(y + i + v)) << v);
      memcpy(signs + i / 8, &bits, sizeof(bits));
    }
    if (i == length) return;
    uint64_t bits = 0;
    for (int64_t v = i; v < length; v += kLanes<T>)
      bits |= bits_of(load_lanes(y + v, length - v)) << (v - i);
    memcpy(signs + i / 8, &bits, ceil_div(length - i, 8));
  }
  void pass(const uint8_t* signs, int64_t length, T* grad) const {
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep) {
      Step bits;
      memcpy(&bits, signs + i / 8, sizeof(bits));
#pragma GCC unroll 4
      for (int v = 0; v < kStep; v += kLanes<T>)
        store_vec(grad + i + v, passed(bits >> v, load_vec(grad + i + v)));
    }
    if (i == length) return;
    Step bits = 0;
    memcpy(&bits, signs + i / 8, ceil_div(length - i, 8));
    for (int64_t v = i; v < length; v += kLanes<T>)
      store_lanes(grad + v, passed(bits >> (v - i), load_lanes(grad + v, length - v)), length - v);
  }

 private:
  // A vector's signs, or those of several that share a byte.
  using Step = std::conditional_t<kLanes<T> == 16, uint16_t, uint8_t>;
  static constexpr int64_t kStep = 8 * sizeof(Step);
  using Lane = typename LaneMask<accumulate_t<T>>::type;

  WEFT_INLINE uint64_t bits_of(V value) const {
    // NaN lets the gradient pass relu, as torch does.
    return lanes_that_hold(relu_ ? ~(value <= 0) : value > 0);
  }
  WEFT_INLINE V passed(Step bits, V grad) const {
    const auto passes = ((Vec<Lane>{} + Lane{bits}) & bit_) != 0;
    return passes ? grad : relu_ ? V{} : grad * slope_;
  }

  bool relu_;
  accumulate_t<T> slope_;
  Vec<Lane> bit_{};  // of each lane
};

void keep_signs(const SignRows& r, const void* y, uint8_t* signs, const Context& context) {
  dispatch_dtype(r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Signs<T> all(r);
    parallel_for(context, r.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        all.keep(static_cast<const T*>(y) + row * r.length, r.length, signs + row * r.bytes());
    });
  });
}

void pass_signs(const SignRows& r, const uint8_t* signs, void* grad, const Context& context) {
  dispatch_dtype(r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Signs<T> all(r);
    parallel_for(context, r.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        all.pass(signs + row * r.bytes(), r.length, static_cast<T*>(grad) + row * r.length);
    });
  });
}

}  // namespace

const BlockKernels block_kernels = {keep_signs, pass_signs, block_backward};

}  // namespace weft::WEFT_TARGET
