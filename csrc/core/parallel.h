// The one way CPU kernels use several threads.
//
// Plain OpenMP: torch's own runtime (libgomp) is the one that gets loaded, so weft and torch share
// one pool of threads, and `Context::threads` carries torch.set_num_threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/context.h"

namespace weft {

// Calls `body(begin, end)` on consecutive parts of [0, count), each of at least `grain` items. The
// parts depend on the number of threads, so a body must not let its result depend on them.
template <class Body>
inline void parallel_for(const Context& context, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int64_t parts = std::min<int64_t>(context.threads, count / std::max<int64_t>(grain, 1));
  if (parts <= 1 || omp_in_parallel()) {
    body(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(parts))
  {
    const int64_t team = omp_get_num_threads();
    const int64_t member = omp_get_thread_num();
    const int64_t begin = count * member / team;
    const int64_t end = count * (member + 1) / team;
    if (begin < end) body(begin, end);
  }
}

// Where the threads of a team meet. They look at one number until it changes: a step takes
// microseconds, and OpenMP's own barrier asks the system to wake whoever sleeps, each time. Where
// cores are fewer than threads, one that has waited long lets others run.
class Meeting {
 public:
  // Returns once `size` threads have called it; what they wrote before is seen after.
  void wait(int64_t size);

 private:
  alignas(64) std::atomic<int64_t> arrived_ = 0;
  alignas(64) std::atomic<int64_t> round_ = 0;
};

// A member of a team of threads that goes through the same steps together.
struct Team {
  int64_t member;
  int64_t size;
  Meeting* meeting = nullptr;  // of a team of one

  // This member's part of [0, count).
  int64_t begin(int64_t count) const { return count * member / size; }
  int64_t end(int64_t count) const { return count * (member + 1) / size; }
  // Returns once every member has called it.
  void barrier() const {
    if (size > 1) meeting->wait(size);
  }
};

// Calls `body(team)` once on each of at most `parts` threads, which may meet at barriers.
template <class Body>
inline void parallel_team(const Context& context, int64_t parts, const Body& body) {
  parts = std::min<int64_t>(context.threads, parts);
  if (parts <= 1 || omp_in_parallel()) {
    body(Team{0, 1});
    return;
  }
  Meeting meeting;
#pragma omp parallel num_threads(static_cast<int>(parts))
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
}

}  // namespace weft
