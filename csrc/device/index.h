// Flat indices and their coordinates.
#pragma once

#include "device/device.h"

namespace weft::device {

WEFT_DEVICE int64_t global_thread() {
  return static_cast<int64_t>(block_index()) * block_size() + thread_index();
}

// An element of an array [outer, D, H, W, inner].
struct Element {
  int64_t outer, d, h, w, inner;
};

WEFT_DEVICE Element split(int64_t flat, const int64_t (&extent)[3], int64_t inner) {
  Element e;
  e.inner = flat % inner;
  flat /= inner;
  e.w = flat % extent[2];
  flat /= extent[2];
  e.h = flat % extent[1];
  flat /= extent[1];
  e.d = flat % extent[0];
  e.outer = flat / extent[0];
  return e;
}

// Where (d, h, w) of the outer and inner index of `e` lies.
WEFT_DEVICE int64_t flat_index(const Element& e, int64_t d, int64_t h, int64_t w,
                               const int64_t (&extent)[3], int64_t inner) {
  return (((e.outer * extent[0] + d) * extent[1] + h) * extent[2] + w) * inner + e.inner;
}

// Division of small numbers (below 2^20) by a number that the host knows: a product and a shift,
// where the hardware's own integer division is some twenty instructions.
class Divider {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor)
      : divisor_(static_cast<uint32_t>(divisor)), factor_((kOne + divisor - 1) / divisor) {}

  // The quotient; `index` becomes the remainder.
  WEFT_HD int split(int& index) const {
    const auto quotient = static_cast<uint32_t>((static_cast<uint64_t>(index) * factor_) >> kShift);
    index -= static_cast<int>(quotient * divisor_);
    return static_cast<int>(quotient);
  }

 private:
  static constexpr int kShift = 40;
  static constexpr int64_t kOne = int64_t{1} << kShift;
  uint32_t divisor_ = 1;
  uint64_t factor_ = static_cast<uint64_t>(kOne);
};

}  // namespace weft::device
