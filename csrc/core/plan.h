// What an op would run, as plain data: what `weft.explain` shows.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace weft {

struct Plan {
  std::string kernel;                                 // the kernel, as host execution reports it
  std::string path;                                   // the algorithm, in words
  std::vector<std::pair<std::string, int64_t>> tile;  // what a block makes: ("h", 14), ...
  int64_t blocks = 0;                                 // 0: not a CUDA launch
  int threads = 0;                                    // per block; on CPU the most that it pays
  int64_t launches = 1;                               // such launches, one after another
  int64_t shared_bytes = 0;                           // per block
  int64_t bytes = 0;                                  // expected traffic
  int64_t least_bytes = 0;                            // every operand once
  int64_t flops = 0;                                  // additions, products and comparisons
};

}  // namespace weft
