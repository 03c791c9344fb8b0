// The op that runs a kernel of selftest.cu or, under host execution, of faults.cpp.
#include "device/selftest.h"
#include "ops_common.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <iterator>

#if WEFT_WITH_CUDA || WEFT_WITH_HOST_EXECUTION

namespace weft {
namespace {

using TableFor = const SelftestKernels* (*)(Target);
constexpr TableFor kTables[] = {
    selftest_kernels_for,        mma_selftest_kernels_for, block_selftest_kernels_for,
    hopper_selftest_kernels_for, fault_kernels_for,        hopper_fault_kernels_for,
};

at::Tensor device_selftest(const at::Tensor& input, c10::string_view word) {
  const char* op = "device_selftest";
  const Target target = target_for(input);
  // There is no CPU version of a device word.
  TORCH_CHECK(selftest_kernels_for(target) != nullptr, op,
              ": runs CUDA kernels, so argument 'input' must be a CUDA tensor ",
              "or the call be inside weft.testing.host_execution(); got a tensor on ",
              input.device());
  TORCH_CHECK(input.is_contiguous(), op, ": argument 'input' must be contiguous");
  const c10::DeviceGuard guard(input.device());
  at::Tensor output = empty_output(input, input.sizes());
  const std::string name(word);
  const auto run = [&](TableFor table_for) {
    const SelftestKernels* kernels = table_for(target);
    return kernels != nullptr &&
           kernels->run(name.c_str(), input.const_data_ptr(), output.mutable_data_ptr(),
                        static_cast<int64_t>(input.nbytes()), context_for(input));
  };
  TORCH_CHECK_VALUE(std::any_of(std::begin(kTables), std::end(kTables), run), op,
                    ": argument 'word' names no kernel of ", target_name(target), ": '", name, "'");
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(weft, m) { m.def("device_selftest(Tensor input, str word) -> Tensor"); }
TORCH_LIBRARY_IMPL(weft, CPU, m) { m.impl("device_selftest", device_selftest); }
TORCH_LIBRARY_IMPL(weft, CUDA, m) { m.impl("device_selftest", device_selftest); }

}  // namespace weft

#endif
