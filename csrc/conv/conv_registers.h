// What keeps the compiler from undoing a register tile on CPU.
#pragma once

#include "core/simd.h"

namespace weft::WEFT_TARGET {
namespace {

// `value`, loaded: the compiler else repeats a load for each product that takes it.
template <class V>
WEFT_INLINE V in_register(V value) {
#if defined(__SSE2__)
  asm("" : "+v"(value));
#endif
  return value;
}
// `pointer`, computed: the compiler else keeps each of its multiples of a step.
template <class T>
WEFT_INLINE const T* computed(const T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

}  // namespace
}  // namespace weft::WEFT_TARGET
