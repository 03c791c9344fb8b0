// A kernel's private memory on CPU: aligned for vectors, freed at the end of its scope; large
// blocks are kept for the next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/kept_memory.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { resize(count); }
  ~Scratch() { free(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // What was held is lost.
  void resize(int64_t count) {
    constexpr int64_t kAlign = 64;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    free();
    block_ = take_block(bytes);
    data_ = static_cast<T*>(block_.memory != nullptr
                                ? block_.memory
                                : std::aligned_alloc(kAlign, bytes > 0 ? bytes : kAlign));
    if (data_ == nullptr) throw std::bad_alloc();
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void free() {
    if (block_.memory != nullptr) {
      give_back(block_);
    } else {
      std::free(data_);
    }
  }

  T* data_ = nullptr;
  KeptBlock block_;  // null where malloc served
};

template <class T>
inline void fill(T* out, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
