// Rows and tiles of rows: what the walks of pooling on CPU share.
#pragma once

#include "core/row_writer.h"
#include "pool/pool_plan.h"
#include "pool/pool_reduce.h"

namespace weft::WEFT_TARGET {
namespace {

// Positions [begin, end) of row (outer, d, h).
struct RowPart {
  int64_t outer, d, h, begin, end;
};

// The rows of an array [outer, D, H, W], each cut into tiles of W: the items that threads share, in
// the order of memory.
class RowTiles {
 public:
  // A tile takes `per_position` bytes for each of its positions, and `shared` positions are read by
  // both of two neighbouring tiles.
  RowTiles(const int64_t (&extents)[3], int64_t per_position, int64_t shared) : extents_(extents) {
    constexpr int64_t kLineBytes = 16384;
    int64_t tiles = extents[2] * per_position / kLineBytes;
    const int64_t most = extents[2] / (2 * shared + 1);
    tiles = tiles < most ? tiles : most;
    tiles = tiles < 1 ? 1 : tiles;
    width_ = ceil_div(extents[2], tiles);
    count_ = ceil_div(extents[2], width_);
  }

  int64_t width() const { return width_; }
  int64_t items(int64_t outer) const { return outer * extents_[0] * extents_[1] * count_; }
  int64_t row(const RowPart& part) const {
    return (part.outer * extents_[0] + part.d) * extents_[1] + part.h;
  }

  RowPart part(int64_t item) const {
    const int64_t row = item / count_;
    RowPart part;
    part.outer = row / (extents_[0] * extents_[1]);
    part.d = row / extents_[1] % extents_[0];
    part.h = row % extents_[1];
    part.begin = item % count_ * width_;
    part.end = end_of(part.begin);
    return part;
  }
  RowPart after(RowPart part) const {
    part.begin = part.end;
    if (part.begin == extents_[2]) {
      part.begin = 0;
      if (++part.h == extents_[1]) {
        part.h = 0;
        if (++part.d == extents_[0]) {
          part.d = 0;
          ++part.outer;
        }
      }
    }
    part.end = end_of(part.begin);
    return part;
  }

 private:
  int64_t end_of(int64_t begin) const {
    return begin + width_ < extents_[2] ? begin + width_ : extents_[2];
  }

  const int64_t (&extents_)[3];
  int64_t width_;  // positions of a tile
  int64_t count_;  // tiles of a row
};

// Calls body(position, place) for the places of a window that lie inside.
template <class Body>
WEFT_INLINE void for_places(const Window& window, int64_t output, int64_t extent,
                            const Body& body) {
  int64_t at = window.first_input(output);
  const int64_t last = at + window.span() < extent ? at + window.span() : extent;
  for (int64_t place = 0; at < last; at += window.dilation, ++place)
    if (at >= 0) body(at, place);
}

// The outputs that cover each input of one axis, and the slot of a ring of `ring` rows that each
// output has.
struct Covers {
  Scratch<Range> outputs;
  Scratch<int64_t> slot;
  const Window window;

  Covers(const Window& window, int64_t inputs, int64_t count, int64_t ring)
      : outputs(inputs), slot(count), window(window) {
    for (int64_t i = 0; i < inputs; ++i) outputs[i] = outputs_covering(window, i, count);
    for (int64_t o = 0; o < count; ++o) slot[o] = o % ring;
  }
  int64_t place(int64_t input, int64_t output) const {
    if (window.dilation == 1) return input - window.first_input(output);
    return place_of(window, input, output);
  }
};

}  // namespace
}  // namespace weft::WEFT_TARGET
