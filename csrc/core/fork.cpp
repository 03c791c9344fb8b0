#include "core/fork.h"

#include <pthread.h>
#include <sys/stat.h>

#include <atomic>

namespace weft {
namespace {

std::atomic<bool> several_at_fork{false}, lost{false};

// On Linux a folder for each thread, which its parent counts as links; elsewhere unknown.
bool has_several_threads() {
  struct stat threads;
  constexpr int kOwnLinks = 2;
  return stat("/proc/self/task", &threads) != 0 || threads.st_nlink != kOwnLinks + 1;
}

[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { several_at_fork = has_several_threads(); }, nullptr,
                   [] {
                     if (several_at_fork) lost = true;
                   });

}  // namespace

bool threads_lost_in_fork() { return lost; }

}  // namespace weft
