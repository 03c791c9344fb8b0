// Images whose sums are not all finite where tiles of outputs share products (conv_winograd.h,
// conv_column_tiles.h): what is not finite spreads over its tiles, and where it came from cannot be
// told from the sums, so these images go the direct way.
#pragma once

#include "conv/conv.h"
#include "core/scratch.h"

namespace weft::WEFT_TARGET {
namespace {

class FailedImages {
 public:
  explicit FailedImages(const ConvProblem& p) : p_(p), failed_(p.n) {
    fill(failed_.data(), p.n, uint8_t{0});
  }

  uint8_t* flags() { return failed_.data(); }

  // Calls body(images, first) for each run of neighbouring ones, `images` a problem of its own.
  template <class Body>
  void for_each_run(const Body& body) const {
    ConvProblem run = p_;
    for (int64_t n = 0; n < p_.n; n += run.n + 1) {
      run.n = 0;
      while (n + run.n < p_.n && failed_[n + run.n]) ++run.n;
      if (run.n > 0) body(run, n);
    }
  }

 private:
  const ConvProblem& p_;
  Scratch<uint8_t> failed_;
};

}  // namespace
}  // namespace weft::WEFT_TARGET
