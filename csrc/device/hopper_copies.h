// Which bytes a copy of a box brings on the CPU, and where they land. For hopper_host.cpp.
#pragma once

#include <algorithm>
#include <cstring>

#include "device/hopper.h"

namespace weft::device {
namespace {

struct BoxCopy {
  unsigned char* shared;
  TensorMap map;
  int coordinates[5];
  int offsets[3];
};

// Byte `offset` of a tile whose rows of 128 bytes begin at an aligned address.
int64_t swizzled(int64_t offset) { return offset ^ (offset / kBoxRowBytes % 8 * 16); }

// visit(row, coordinates of its first element) for each row of a box; the row lies outside the
// tensor where any coordinate but the first does.
template <class Visit>
void for_each_row(const BoxCopy& copy, const Visit& visit) {
  const TensorView& t = copy.map.tensor;
  const int last = t.rank - 1;
  int64_t at[5] = {};
  std::copy_n(copy.coordinates, t.rank, at);
  if (!copy.map.windows) {
    int64_t index[5] = {};
    const int64_t rows = copy.map.box_bytes() / kBoxRowBytes;
    for (int64_t row = 0; row < rows; ++row) {
      for (int a = 1; a <= last; ++a) at[a] = copy.coordinates[a] + index[a];
      visit(row, at);
      for (int a = 1; a <= last && ++index[a] == copy.map.tile.extent[a]; ++a) index[a] = 0;
    }
    return;
  }
  const WindowBox& box = copy.map.window;
  for (int pixel = 0; pixel < box.pixels; ++pixel) {
    int64_t place[5];
    std::copy_n(at, t.rank, place);
    for (int a = 1; a < last; ++a) place[a] += copy.offsets[a - 1];
    visit(pixel, place);
    int a = 1;
    for (; a < last; ++a) {
      at[a] += box.stride[a - 1];
      if (at[a] <= t.extent[a] - 1 + box.upper[a - 1]) break;
      at[a] = box.lower[a - 1];
    }
    if (a == last) ++at[last];
  }
}

// visit(shared offset of the row, its first byte in global memory, bytes inside the tensor).
template <class Visit>
void for_each_piece(const BoxCopy& copy, const Visit& visit) {
  const TensorView& t = copy.map.tensor;
  const int64_t size = size_of(t.dtype);
  for_each_row(copy, [&](int64_t row, const int64_t (&at)[5]) {
    const int64_t begin = std::max<int64_t>(at[0], 0);
    const int64_t end = std::min<int64_t>(at[0] + kBoxRowBytes / size, t.extent[0]);
    bool inside = begin < end;
    int64_t offset = begin;
    for (int a = 1; a < t.rank; ++a) {
      inside = inside && at[a] >= 0 && at[a] < t.extent[a];
      offset += at[a] * t.step[a];
    }
    if (inside)
      visit(row * kBoxRowBytes + (begin - at[0]) * size,
            static_cast<const unsigned char*>(t.base) + offset * size, (end - begin) * size);
  });
}

void land(const BoxCopy& copy) {
  memset(copy.shared, 0, copy.map.box_bytes());
  for_each_piece(copy, [&](int64_t to, const unsigned char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) copy.shared[swizzled(to + i)] = from[i];
  });
}

}  // namespace
}  // namespace weft::device
