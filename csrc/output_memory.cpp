#include "output_memory.h"

#include <c10/core/CPUAllocator.h>

#include "core/kept_memory.h"

namespace weft {
namespace {

class OutputMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const KeptBlock block = take_block(bytes);
    if (block.memory == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block.memory, bytes);
    return {block.memory, new KeptBlock(block), release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* context) {
    auto* const block = static_cast<KeptBlock*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->memory);
    give_back(*block);
    delete block;
  }
};

}  // namespace

c10::Allocator* output_memory() {
  static OutputMemory memory;
  return &memory;
}

}  // namespace weft
