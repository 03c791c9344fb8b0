#include "ops_common.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/fork.h"
#include "output_memory.h"

#if WEFT_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif
#if WEFT_WITH_HOST_EXECUTION
#include "device/device.h"
#endif

namespace weft {
namespace {

struct CpuTarget {
  Target target;
  const char* name;
  bool (*supported)();
};

constexpr CpuTarget kCpuTargets[] = {
#if WEFT_X86
    {Target::avx512, "avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma");
     }},
    {Target::avx2, "avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {Target::baseline, "baseline", [] { return true; }},
};

Target best_cpu_target() {
  for (const CpuTarget& t : kCpuTargets)
    if (t.supported()) return t.target;
  return Target::baseline;
}

std::atomic<Target> chosen_cpu_target{best_cpu_target()};
std::atomic<bool> host_execution_enabled{false};
std::atomic<bool> sm90a_kernels_enabled{[] {
  const char* wanted = std::getenv("WEFT_SM90A");
  return wanted != nullptr && strcmp(wanted, "1") == 0;
}()};

struct PlanRequest {
  bool open = false;
  Target target = Target::baseline;
  std::vector<Plan> plans;
};
thread_local PlanRequest plan_request;

// Families register before `main`, in no known order.
std::vector<std::string>& planned_op_names() {
  static std::vector<std::string> names;
  return names;
}

}  // namespace

Target cpu_target() { return chosen_cpu_target; }

std::string target_name(Target target) {
  for (const CpuTarget& t : kCpuTargets)
    if (t.target == target) return t.name;
  return target == Target::cuda ? "cuda" : "cuda-on-host";
}

Target target_named(const std::string& name) {
  for (const CpuTarget& t : kCpuTargets)
    if (name == t.name) return t.target;
  TORCH_CHECK_VALUE(name == "cuda" || name == "cuda-on-host", "weft: expected target 'cuda', ",
                    "'cuda-on-host' or a CPU's instruction set, got '", name, "'");
  return name == "cuda" ? Target::cuda : Target::cuda_on_host;
}

std::vector<std::string> available_cpu_targets() {
  std::vector<std::string> names;
  for (const CpuTarget& t : kCpuTargets)
    if (t.supported()) names.emplace_back(t.name);
  return names;
}

void set_cpu_target(const std::string& name) {
  if (name.empty()) {
    chosen_cpu_target = best_cpu_target();
    return;
  }
  for (const CpuTarget& t : kCpuTargets)
    if (name == t.name && t.supported()) {
      chosen_cpu_target = t.target;
      return;
    }
  TORCH_CHECK_VALUE(false, "weft: CPU target '", name,
                    "' is not one of this machine's: ", c10::Join(", ", available_cpu_targets()));
}

void set_host_execution(bool enabled) {
#if WEFT_WITH_HOST_EXECUTION
  host_execution_enabled = enabled;
#else
  TORCH_CHECK(!enabled,
              "weft: this build has no host-executed CUDA kernels. They are a test "
              "instrument: build with WEFT_HOST_EXECUTION=1.");
#endif
}

bool host_execution() { return host_execution_enabled; }

void set_sm90a_kernels(bool enabled) { sm90a_kernels_enabled = enabled; }

bool sm90a_kernels() { return sm90a_kernels_enabled; }

void request_plans(Target target) {
  plan_request.open = true;
  plan_request.target = target;
  plan_request.plans.clear();
}

std::vector<Plan> take_plans() {
  plan_request.open = false;
  return std::move(plan_request.plans);
}

bool planning() { return plan_request.open; }
Target planned_target() { return plan_request.target; }
void note_plan(Plan plan) { plan_request.plans.push_back(std::move(plan)); }

bool register_planned_ops(std::initializer_list<const char*> names) {
  planned_op_names().insert(planned_op_names().end(), names.begin(), names.end());
  return true;
}

const std::vector<std::string>& planned_ops() { return planned_op_names(); }

Target target_for(const at::Tensor& t) {
  if (t.is_cuda()) return Target::cuda;
  return host_execution() ? Target::cuda_on_host : cpu_target();
}

Context context_for(const at::Tensor& t) {
  Context context;
  context.sm90a = sm90a_kernels();
#if WEFT_WITH_CUDA
  if (t.is_cuda()) {
    context.stream = c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
    return context;
  }
#endif
  context.threads = threads_lost_in_fork() ? 1 : at::get_num_threads();
  return context;
}

DType dtype_of(const at::Tensor& t, const char* op, const char* argument) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "weft::", op, ": \"", op, "\" not implemented for '",
                                  toString(t.scalar_type()), "': argument '", argument,
                                  "' must be float32, float64, bfloat16 or float16");
  }
}

at::Tensor empty_output(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype,
                        at::MemoryFormat format) {
  const auto options = like.options().dtype(dtype);
#if WEFT_WITH_HOST_EXECUTION
  if (!planning() && target_for(like) == Target::cuda_on_host) {
    // A meta tensor gives the strides.
    const auto plan = at::empty(sizes, options.device(at::kMeta), format);
    void* memory = device::allocate_guarded(static_cast<int64_t>(plan.nbytes()));
    return at::from_blob(memory, sizes, plan.strides(), device::release_guarded, options);
  }
#endif
  if (like.is_cpu())
    return at::Tensor(at::detail::empty_generic(
        sizes, output_memory(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format));
  return at::empty(sizes, options, format);
}

at::MemoryFormat layout_of(const at::Tensor& t) {
  const auto format = t.suggest_memory_format();
  return t.dim() >= 4 ? format : at::MemoryFormat::Contiguous;
}

void check_same(const at::Tensor& t, const at::Tensor& reference, const char* op,
                const char* argument) {
  TORCH_CHECK(t.device() == reference.device(), "weft::", op,
              ": expected all tensors to be on the same device, but argument '", argument,
              "' is on ", t.device(), " and the input on ", reference.device());
  TORCH_CHECK(t.scalar_type() == reference.scalar_type(), "weft::", op,
              ": expected all tensors to have the same dtype, but argument '", argument, "' is ",
              toString(t.scalar_type()), " and the input ", toString(reference.scalar_type()));
}

}  // namespace weft
