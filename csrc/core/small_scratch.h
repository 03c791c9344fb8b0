// Scratch of a call that is made for a few rows at a time: small ones lie on the stack, since
// asking for memory takes as long as such a call.
#pragma once

#include "core/scratch.h"

namespace weft::WEFT_TARGET {
namespace {

// What up to kSmall elements need no memory for. Not initialised.
template <class T, int64_t kSmall>
class SmallScratch {
 public:
  explicit SmallScratch(int64_t count) {
    if (count > kSmall) large_.resize(count);
    data_ = count > kSmall ? large_.data() : small_;
  }
  SmallScratch(const SmallScratch&) = delete;
  SmallScratch& operator=(const SmallScratch&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  alignas(64) T small_[kSmall];
  Scratch<T> large_;
  T* data_;
};

}  // namespace
}  // namespace weft::WEFT_TARGET
