// The op that runs a kernel of selftest.cu or, under host execution, of faults.cpp.
#include "device/selftest.h"
#include "ops_common.h"

#include <c10/core/DeviceGuard.h>

#if WEFT_WITH_CUDA || WEFT_WITH_HOST_EXECUTION

namespace weft {
namespace {

// All for the CUDA source alone: there is no CPU version of a device word.
const SelftestKernels* words_for(Target target) {
  switch (target) {
    WEFT_CASE_CUDA(selftest_kernels)
    WEFT_CASE_HOST(selftest_kernels)
    default:
      return nullptr;
  }
}
const SelftestKernels* mma_words_for(Target target) {
  switch (target) {
    WEFT_CASE_CUDA(mma_selftest_kernels)
    WEFT_CASE_HOST(mma_selftest_kernels)
    default:
      return nullptr;
  }
}
const SelftestKernels* block_words_for(Target target) {
  switch (target) {
    WEFT_CASE_CUDA(block_selftest_kernels)
    WEFT_CASE_HOST(block_selftest_kernels)
    default:
      return nullptr;
  }
}
const SelftestKernels* hopper_words_for(Target target) {
  switch (target) {
    WEFT_CASE_CUDA(hopper_selftest_kernels)
    WEFT_CASE_HOST(hopper_selftest_kernels)
    default:
      return nullptr;
  }
}
const SelftestKernels* faults_for(Target target) {
  switch (target) {
    WEFT_CASE_HOST(fault_kernels)
    default:
      return nullptr;
  }
}

const SelftestKernels* hopper_faults_for(Target target) {
  switch (target) {
    WEFT_CASE_HOST(hopper_fault_kernels)
    default:
      return nullptr;
  }
}

at::Tensor device_selftest(const at::Tensor& input, c10::string_view word) {
  const char* op = "device_selftest";
  const Target target = target_for(input);
  const SelftestKernels* words = words_for(target);
  const SelftestKernels* faults = faults_for(target);
  TORCH_CHECK(
      words != nullptr, op, ": runs CUDA kernels, so argument 'input' must be a CUDA tensor ",
      "or the call be inside weft.testing.host_execution(); got a tensor on ", input.device());
  TORCH_CHECK(input.is_contiguous(), op, ": argument 'input' must be contiguous");
  const c10::DeviceGuard guard(input.device());
  at::Tensor output = empty_output(input, input.sizes());
  const std::string name(word);
  const auto run = [&](const SelftestKernels* kernels) {
    return kernels != nullptr &&
           kernels->run(name.c_str(), input.const_data_ptr(), output.mutable_data_ptr(),
                        static_cast<int64_t>(input.nbytes()), context_for(input));
  };
  TORCH_CHECK_VALUE(
      run(words) || run(mma_words_for(target)) || run(block_words_for(target)) ||
          run(hopper_words_for(target)) || run(faults) || run(hopper_faults_for(target)),
      op, ": argument 'word' names no kernel of ", target_name(target), ": '", name, "'");
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) { m.def("device_selftest(Tensor input, str word) -> Tensor"); }
TORCH_LIBRARY_IMPL(weft, CPU, m) { m.impl("device_selftest", device_selftest); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { m.impl("device_selftest", device_selftest); }

}  // namespace weft

#endif
