// Threads and fork().
#pragma once

namespace weft {

// True in a child of a process that had threads: libgomp's do not survive the fork, and a team in
// the child would wait for them for ever. A child of one thread's process may have its own.
bool threads_lost_in_fork();

}  // namespace weft
