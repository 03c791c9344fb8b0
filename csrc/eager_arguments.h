// Arguments of an eager path (eager.h) beside tensors, as Python has them. What cannot be read is
// declined, and left to Python to convert or to say what is wrong with it.
#pragma once

#include <pybind11/pybind11.h>

#include <c10/util/ArrayRef.h>

#include <array>
#include <string>

namespace weft {

namespace py = pybind11;

// A few numbers, such as one per axis; none at all for None.
struct Ints {
  std::array<int64_t, 6> value{};
  size_t count = 0;

  at::IntArrayRef all() const { return {value.data(), count}; }
};

inline bool read_int(PyObject* from, int64_t& to) {
  int overflow = 0;
  if (!PyLong_CheckExact(from)) return false;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  return overflow == 0;
}

inline bool read_flag(PyObject* from, bool& to) {
  to = from == Py_True;
  return PyBool_Check(from);
}

inline bool read_number(PyObject* from, double& to) {
  int64_t whole = 0;
  if (!PyFloat_CheckExact(from) && !read_int(from, whole)) return false;
  to = PyFloat_CheckExact(from) ? PyFloat_AS_DOUBLE(from) : static_cast<double>(whole);
  return true;
}

inline bool read_name(PyObject* from, std::string& to) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_CheckExact(from) ? PyUnicode_AsUTF8AndSize(from, &length) : nullptr;
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  to.assign(text, static_cast<size_t>(length));
  return true;
}

// A tuple of ints.
inline bool read_ints(PyObject* from, Ints& to) {
  if (!PyTuple_Check(from)) return false;  // torch.Size too
  to.count = static_cast<size_t>(PyTuple_GET_SIZE(from));
  if (to.count > to.value.size()) return false;
  for (size_t i = 0; i < to.count; ++i)
    if (!read_int(PyTuple_GET_ITEM(from, i), to.value[i])) return false;
  return true;
}

// An int for all of `rank` axes, or a tuple or list of one per axis.
inline bool read_axes(PyObject* from, int64_t rank, Ints& to) {
  const bool sequence = PyTuple_CheckExact(from) || PyList_CheckExact(from);
  const int64_t given = sequence ? PySequence_Fast_GET_SIZE(from) : 1;
  if (given != 1 && given != rank) return false;
  to.count = static_cast<size_t>(rank);
  for (int64_t i = 0; i < rank; ++i) {
    PyObject* item = sequence ? PySequence_Fast_GET_ITEM(from, given == 1 ? 0 : i) : from;
    if (!read_int(item, to.value[i])) return false;
  }
  return true;
}

inline py::tuple as_tuple(at::IntArrayRef values) {
  py::tuple result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = values[i];
  return result;
}

}  // namespace weft
