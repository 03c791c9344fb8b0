// What every *_ops.cpp needs of torch: which target runs a tensor, allocation, argument completion.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <torch/library.h>

#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/dtype.h"
#include "core/plan.h"

namespace weft {

// ---- where to run --------------------------------------------------------------------------

// The best CPU target of this machine, or the one that set_cpu_target names.
Target cpu_target();
std::string target_name(Target target);
// The inverse, for any target, built in or not.
Target target_named(const std::string& name);
// "" restores the machine's best. Throws for one that this machine or build does not have.
void set_cpu_target(const std::string& name);
std::vector<std::string> available_cpu_targets();

void set_host_execution(bool enabled);
bool host_execution();

// Whether CUDA kernels of Hopper's own words are chosen, where they suit. They are not measured
// yet, so the default is the environment's WEFT_SM90A=1.
void set_sm90a_kernels(bool enabled);
bool sm90a_kernels();

inline bool is_cpu(Target target) {
  return target != Target::cuda && target != Target::cuda_on_host;
}
// The target that serves tensors like `t`, and the resources of a call on it.
Target target_for(const at::Tensor& t);
Context context_for(const at::Tensor& t);

// ---- plans ---------------------------------------------------------------------------------

// While a request for plans is open on this thread, the ops that are registered for it check their
// arguments, note what they would run on `planned_target`, and run nothing, so meta tensors do.
void request_plans(Target target);
std::vector<Plan> take_plans();  // closes the request
bool planning();
Target planned_target();
void note_plan(Plan plan);
// Called once for a family, when the module is loaded; returns true.
bool register_planned_ops(std::initializer_list<const char*> names);
const std::vector<std::string>& planned_ops();

// The kernels of `t`'s target; an error if this build has none for its device.
template <class Table>
const Table& kernels_for(const at::Tensor& t, const Table* (*table_for)(Target)) {
  const Table* table = table_for(planning() ? Target::baseline : target_for(t));
  TORCH_CHECK(table != nullptr, "weft: this build has no kernels for device ", t.device(),
              ". It was built without CUDA: install a CUDA build of torch and nvcc, and build weft "
              "again with WEFT_CUDA=1.");
  return *table;
}

// ---- tensors -------------------------------------------------------------------------------

// The DType of `t`; `op` and `argument` are for the error.
DType dtype_of(const at::Tensor& t, const char* op, const char* argument);

// Memory for a kernel's output, on the device of `like`. Under host execution it is guarded.
at::Tensor empty_output(const at::Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);
inline at::Tensor empty_output(const at::Tensor& like, at::IntArrayRef sizes,
                               at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return empty_output(like, sizes, like.scalar_type(), format);
}

// channels-last if `t` is so laid out (4-d and 5-d), else contiguous.
at::MemoryFormat layout_of(const at::Tensor& t);

// Throws unless `t` has the dtype and device of `reference`.
void check_same(const at::Tensor& t, const at::Tensor& reference, const char* op,
                const char* argument);

}  // namespace weft
