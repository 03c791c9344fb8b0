// What every eager op asks of this thread, and the way back to Python; see eager.h.
#include "eager.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace weft {
namespace {

bool holds_more(c10::DispatchKeySet keys, c10::DispatchKeySet than) {
  return (keys.raw_repr() & ~than.raw_repr()) != 0;
}

}  // namespace

bool nothing_watches() {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return !holds_more(local.included_, c10::default_included_set) &&
         local.excluded_.has_all(c10::default_excluded_set) && !torch::jit::tracer::isTracing();
}

bool is_plain(const at::Tensor& t) {
  if (!t.defined()) return true;
  constexpr c10::DispatchKeySet kPlain(
      {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCPU,
       c10::DispatchKey::AutogradCUDA, c10::DispatchKey::ADInplaceOrView,
       c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});
  return !holds_more(t.key_set(), kPlain) && !torch::autograd::isFwGradDefined(t);
}

variable_list backward_in_python(const char* module, const char* function,
                                 const variable_list& saved, const variable_list& grads,
                                 const std::vector<bool>& wanted, const py::dict& attributes) {
  const auto tensor = [](const at::Tensor& t) -> py::object {
    return t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none();
  };
  py::tuple kept(saved.size()), asked(wanted.size()), arguments(grads.size() + 1);
  for (size_t i = 0; i < saved.size(); ++i) kept[i] = tensor(saved[i]);
  for (size_t i = 0; i < wanted.size(); ++i) asked[i] = py::bool_(wanted[i]);
  const py::object ctx = py::module_::import("types").attr("SimpleNamespace")(**attributes);
  ctx.attr("saved_tensors") = kept;
  ctx.attr("needs_input_grad") = asked;
  arguments[0] = ctx;
  for (size_t i = 0; i < grads.size(); ++i) arguments[i + 1] = tensor(grads[i]);
  const py::object backward = py::module_::import(module).attr(function).attr("backward");
  const py::tuple found = backward(*arguments);
  variable_list result;
  for (const py::handle item : found)
    result.push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
  return result;
}

}  // namespace weft
