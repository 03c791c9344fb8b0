// The eager path of a differentiable op: forward and its backward node without Python in between.
//
// An op as small as one step of a cell costs a few microseconds; a Python autograd Function around
// it costs thirty. `apply_eagerly` does the same work in C++ where nothing but plain tensors,
// kernels and autograd's graph is involved, and declines (returns None) otherwise. What Python's
// Function (python/weft/autograd.py) defines stays the definition of the op: it takes every call
// that is declined (compilers, torch.func, modes, autocast, subclasses, forward-mode derivatives),
// and its `backward` is called, with what was saved here, wherever backward is itself
// differentiated.
//
// An op is a struct:
//   static constexpr const char *kModule, *kFunction;  where its Python Function is
//   static constexpr size_t kTensors;    tensors come first among the arguments; None is undefined
//   static constexpr size_t kOptions;    how many other arguments follow
//   static constexpr size_t kReturned;   the caller gets that many of the outputs
//   static constexpr size_t kDifferentiable;  the first so many outputs have gradients, returned
//                                             or, for a double backward, not
//   bool read(PyObject* const* options); false declines
//   void attributes(py::dict&) const;    what the Function's `save` leaves on ctx beside tensors
//   variable_list forward(in, bool keep);  may note in the op what `gradients` needs; what it gives
//                                          beyond the returned outputs is for `saved`
//   variable_list saved(in, outputs, needed) const;  in the order of the Function's `save`
//   variable_list gradients(saved, grads, wanted) const;  of the tensors; undefined if not wanted
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace weft {

using torch::autograd::variable_list;
using NodePointer = decltype(torch::autograd::Edge::function);  // differs between torch's versions

// True if no mode, transform, autocast or tracer watches this thread's calls.
bool nothing_watches();
// True if `t` is undefined, or memory of a CPU or CUDA device and nothing else.
bool is_plain(const at::Tensor& t);

// What `module.function.backward` gives for `saved` and `grads`.
variable_list backward_in_python(const char* module, const char* function,
                                 const variable_list& saved, const variable_list& grads,
                                 const std::vector<bool>& wanted, const py::dict& attributes);

template <class Op>
class EagerNode final : public torch::autograd::Node {
 public:
  explicit EagerNode(const Op& op) : op_(op) {}

  void save(const variable_list& tensors, const variable_list& outputs) {
    saved_.reserve(tensors.size());
    for (const at::Tensor& t : tensors) {
      bool is_output = false;
      for (const at::Tensor& output : outputs) is_output |= t.defined() && t.is_same(output);
      saved_.emplace_back(t, is_output);
    }
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list saved;
    saved.reserve(saved_.size());
    for (const auto& s : saved_) saved.push_back(s.unpack(getptr()));
    std::vector<bool> wanted(Op::kTensors);
    for (size_t i = 0; i < Op::kTensors; ++i) wanted[i] = task_should_compute_output(i);
    bool any = false, differentiable = at::GradMode::is_enabled() || !nothing_watches();
    for (size_t i = 0; i < grads.size(); ++i) {
      any |= grads[i].defined();
      // A gradient of what only backward sees comes from a backward that was differentiated.
      differentiable |= grads[i].defined() && (i >= Op::kReturned || !is_plain(grads[i]));
    }
    if (!any) return variable_list(Op::kTensors);
    if (!differentiable) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return op_.gradients(saved, grads, wanted);
    }
    const py::gil_scoped_acquire gil;
    py::dict attributes;
    op_.attributes(attributes);
    wanted.resize(Op::kTensors + Op::kOptions);
    variable_list found =
        backward_in_python(Op::kModule, Op::kFunction, saved, grads, wanted, attributes);
    found.resize(Op::kTensors);
    return found;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved_) s.reset_data();
  }

  std::string name() const override { return std::string(Op::kFunction) + "Backward"; }

 private:
  Op op_;
  std::vector<torch::autograd::SavedVariable> saved_;
};

// As torch's own nodes are made: torch counts their references inside them from 2.13 on; before,
// long graphs are taken apart by its `deleteNode` so that destructors do not nest.
template <class Node, class Argument>
NodePointer make_node(const Argument& argument) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<Node>(new Node(argument), [](Node* node) { deleteNode(node); });
  else
    return c10::make_intrusive<Node>(argument);
}

template <class Op>
NodePointer eager_node(const Op& op, const std::array<at::Tensor, Op::kTensors>& in) {
  torch::autograd::edge_list edges;
  edges.reserve(in.size());
  for (const at::Tensor& t : in)
    edges.push_back(t.defined() ? torch::autograd::impl::gradient_edge(t)
                                : torch::autograd::Edge());
  NodePointer node = make_node<EagerNode<Op>>(op);
  node->set_next_edges(std::move(edges));
  return node;
}

// A Python function of fixed arguments, to be called without keywords.
template <class Op>
PyObject* apply_eagerly(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Op op;
  std::array<at::Tensor, Op::kTensors> in;
  if (count != static_cast<Py_ssize_t>(Op::kTensors + Op::kOptions) || !nothing_watches() ||
      !op.read(args + Op::kTensors))
    Py_RETURN_NONE;
  std::array<bool, Op::kTensors> needed{};
  bool any = false;
  for (size_t i = 0; i < Op::kTensors; ++i) {
    if (Py_IsNone(args[i])) continue;
    if (!THPVariable_CheckExact(args[i])) Py_RETURN_NONE;
    in[i] = THPVariable_Unpack(args[i]);
    if (!is_plain(in[i])) Py_RETURN_NONE;
    needed[i] = at::GradMode::is_enabled() && in[i].requires_grad();
    any |= needed[i];
  }
  variable_list outputs;
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView below;
    RECORD_FUNCTION(Op::kFunction, c10::ArrayRef<const c10::IValue>());
    outputs = op.forward(in, any);
  }
  if (any) {
    const auto node = eager_node(op, in);
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (i < Op::kDifferentiable) {
        torch::autograd::set_history(outputs[i], node);
      } else {
        node->add_input_metadata(torch::autograd::Node::undefined_input());
      }
    }
    static_cast<EagerNode<Op>*>(node.get())->save(op.saved(in, outputs, needed), outputs);
  }
  if constexpr (Op::kReturned == 1) return THPVariable_Wrap(std::move(outputs[0]));
  py::tuple returned(Op::kReturned);
  for (size_t i = 0; i < Op::kReturned; ++i)
    PyTuple_SET_ITEM(returned.ptr(), i, THPVariable_Wrap(std::move(outputs[i])));
  return returned.release().ptr();
  END_HANDLE_TH_ERRORS
}

// A row of a PyMethodDef table.
template <class Op>
PyMethodDef eager_method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(apply_eagerly<Op>)),
          METH_FASTCALL, nullptr};
}

}  // namespace weft
