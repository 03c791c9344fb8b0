// The parts of pooling on CPU that `pool_cpu.cpp` puts into one table; see PoolKernels. All but
// max_forward take problems as `pool_with_fixed_windows` leaves them.
#pragma once

#include "core/parallel.h"
#include "pool/pool_plan.h"

namespace weft::WEFT_TARGET {

void max_forward(const PoolProblem&, const void* x, void* y, void* places, const Context&);
void max_backward(const PoolProblem&, const void* gy, const void* places, void* gx, const Context&);
void max_pick(const PoolProblem&, const void* x, const void* places, void* y, const Context&);
void max_indices(const PoolProblem&, const void* places, int64_t* indices, const Context&);
void avg_forward(const PoolProblem&, const void* x, void* y, const Context&);
void avg_backward(const PoolProblem&, const void* gy, void* gx, const Context&);

// Problems that `pool_takes_lanes`, as they were given.
void max_forward_in_lanes(const PoolProblem&, const void* x, void* y, void* places, const Context&);
void avg_forward_in_lanes(const PoolProblem&, const void* x, void* y, const Context&);
void avg_backward_in_lanes(const PoolProblem&, const void* gy, void* gx, const Context&);

// Items of a walk over `elements` elements in all that are worth a thread.
inline int64_t pool_grain(int64_t items, int64_t elements) {
  return 1 + kPoolGrain / (1 + elements / (items > 0 ? items : 1));
}

// Calls `body` with the integer that holds a place.
template <class Body>
inline __attribute__((always_inline)) void dispatch_place(const PoolProblem& p, const Body& body) {
  if (p.place_bytes() == 1) {
    body(uint8_t{});
  } else {
    body(int32_t{});
  }
}

}  // namespace weft::WEFT_TARGET
