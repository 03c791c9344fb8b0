// A vector of hidden units, or what is left of one at the end of a row. Most are whole: without
// being told, the compiler puts whole vectors out of the way.
#pragma once

#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

template <class T>
WEFT_INLINE Vec<accumulate_t<T>> load_units(const T* address, int count) {
  if (count == kLanes<T>) [[likely]]
    return load_vec(address);
  return load_part(address, count);
}
template <class T>
WEFT_INLINE Vec<accumulate_t<T>> load_units_or_zero(const T* address, int64_t offset, int count) {
  return address ? load_units(address + offset, count) : Vec<accumulate_t<T>>{};
}
template <class T, class V>
WEFT_INLINE void store_units(T* address, V value, int count) {
  if (count == kLanes<T>) [[likely]] {
    store_vec(address, value);
  } else {
    store_part(address, value, count);
  }
}

}  // namespace
}  // namespace weft::WEFT_TARGET
