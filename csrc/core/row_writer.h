// How CPU kernels write outputs that are larger than the cache.
#pragma once

#include <cstring>

#include "core/scratch.h"
#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

// Hands out places for a thread's consecutive output rows, and streams them to memory if asked.
// `largest_row` elements may be written at once.
template <class T>
class RowWriter {
 public:
  RowWriter(T* out, int64_t largest_row, bool stream)
      : out_(out), stream_(stream), staged_(stream ? kStage + largest_row : 0) {}
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;
  ~RowWriter() {
    restart(nullptr);
    if (stream_) stream_fence();
  }

  // Goes on at `out`.
  void restart(T* out) {
    if (count_ > 0) memcpy(static_cast<void*>(out_), staged_.data(), count_ * sizeof(T));
    count_ = 0;
    out_ = out;
  }

  // Where the next row goes.
  T* row() { return stream_ ? staged_.data() + count_ : out_; }
  // `n` elements were written there.
  void advance(int64_t n) {
    if (!stream_) {
      out_ += n;
      return;
    }
    count_ += n;
    if (count_ >= kStage) flush();
  }

 private:
  static constexpr int64_t kStage = 2048 / static_cast<int64_t>(sizeof(T));

  void flush() {
    // The first elements may lie before a vector's boundary.
    const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_) % kVectorBytes);
    const int64_t head = misaligned == 0 ? 0 : (kVectorBytes - misaligned) / sizeof(T);
    memcpy(static_cast<void*>(out_), staged_.data(), head * sizeof(T));
    const int64_t bytes = (count_ - head) * sizeof(T) / kVectorBytes * kVectorBytes;
    stream_copy(out_ + head, staged_.data() + head, bytes);
    const int64_t done = head + bytes / sizeof(T);
    out_ += done;
    count_ -= done;
    memmove(static_cast<void*>(staged_.data()), staged_.data() + done, count_ * sizeof(T));
  }

  T* out_;
  bool stream_;
  Scratch<T> staged_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace weft::WEFT_TARGET
