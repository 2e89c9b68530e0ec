// The arrays of a Python caller as the kernels see them: NumPy's, and torch's through DLPack.
// Included by bindings.cpp and half.h.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>

namespace fastlstm {

struct Array {
  static constexpr int kDims = 4;
  void* data = nullptr;   // null for None
  int itemsize = 0;       // 4 or 8: float32 or float64 in native order; 2: half precision
  bool bfloat16 = false;  // which half: bfloat16
  int dims = 0;
  int64_t shape[kDims] = {};
  int64_t step[kDims] = {};  // strides, counting elements

  bool half() const { return itemsize == 2; }
  bool same_dtype(const Array& other) const {
    return itemsize == other.itemsize && bfloat16 == other.bfloat16;
  }
  // Of its elements, if they lie without gaps.
  int64_t bytes() const {
    int64_t count = itemsize;
    for (int d = 0; d < dims; ++d) count *= shape[d];
    return packed() ? count : 0;
  }
  bool empty() const { return std::find(shape, shape + dims, 0) != shape + dims; }
  // A row may be read as it stands: its elements are neighbours.
  bool has_rows() const { return step[dims - 1] == 1 || shape[dims - 1] == 1; }
  // With a dimension of one before dimension `d`.
  Array with_one(int d) const {
    Array wider = *this;
    std::copy_backward(shape + d, shape + dims, wider.shape + dims + 1);
    std::copy_backward(step + d, step + dims, wider.step + dims + 1);
    wider.shape[d] = 1;
    ++wider.dims;
    return wider;
  }
  // The first two dimensions in the other order.
  Array swapped() const {
    Array other = *this;
    std::swap(other.shape[0], other.shape[1]);
    std::swap(other.step[0], other.step[1]);
    return other;
  }
  // C-contiguous.
  bool packed() const {
    int64_t expected = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (shape[d] != 1 && step[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
};

// The part that is used here of the C structures that DLPack fixes (dmlc.github.io/dlpack).
namespace dlpack {
struct Tensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t dims;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*view)(void* object, Tensor* out);  // fills `out`, which owns nothing; may be null
  void* stream;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;
}  // namespace dlpack

// What is known of torch; nothing until fastlstm.nn says.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* memory = nullptr;                  // memory_of_a_step() of _torch.py
  const dlpack::Exchange* exchange = nullptr;  // null: read the attributes of a tensor instead
};
inline Torch torch;

namespace detail {
namespace py = pybind11;

inline bool view_numpy(py::handle object, Array* out) {
  const auto* array = py::detail::array_proxy(object.ptr());
  const auto* dtype = py::detail::array_descriptor_proxy(array->descr);
  const bool aligned = array->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  out->itemsize = dtype->type_num == py::detail::npy_api::NPY_FLOAT_    ? 4
                  : dtype->type_num == py::detail::npy_api::NPY_DOUBLE_ ? 8
                                                                        : 0;
  if (!out->itemsize || dtype->byteorder == '>' || !aligned || array->nd > Array::kDims)
    return false;
  out->data = array->data;
  out->dims = array->nd;
  for (int d = 0; d < array->nd; ++d) {
    out->shape[d] = array->dimensions[d];
    const int64_t stride = out->shape[d] == 1 ? 0 : array->strides[d];  // of one it may be anything
    if (stride % out->itemsize) return false;
    out->step[d] = stride / out->itemsize;
  }
  return true;
}

// Whether a tensor has memory where it says. A view with an offset into a storage that was given
// back has an address, too: that offset. So torch is asked where an address can be one.
inline bool in_memory(py::handle tensor, const Array& array) {
  constexpr uintptr_t kOffsets = uintptr_t(1) << 40;  // more than any storage has bytes
  if (!array.data || array.empty()) return array.empty();
  return uintptr_t(array.data) >= kOffsets ||
         tensor.attr("storage_offset")().cast<uintptr_t>() * uintptr_t(array.itemsize) !=
             uintptr_t(array.data);
}

inline bool view_dlpack(py::handle object, Array* out) {
  dlpack::Tensor tensor;
  if (torch.exchange->view(object.ptr(), &tensor)) {
    PyErr_Clear();  // a layout or a device that DLPack has no word for
    return false;
  }
  const auto [code, bits, lanes] = tensor.dtype;
  const bool bfloat16 = code == dlpack::kBfloat && bits == 16;
  const bool readable =
      bfloat16 || (code == dlpack::kFloat && (bits == 16 || bits == 32 || bits == 64));
  if (tensor.device.type != dlpack::kCpu || !readable || lanes != 1 || tensor.dims > Array::kDims)
    return false;
  out->data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  out->itemsize = bits / 8;
  out->bfloat16 = bfloat16;
  out->dims = tensor.dims;
  for (int d = 0; d < tensor.dims; ++d) {
    out->shape[d] = tensor.shape[d];
    out->step[d] = tensor.strides[d];
  }
  return in_memory(object, *out);  // a tensor of zeros may have none at all
}

// For a torch older than its exchange table.
inline bool view_attributes(py::handle object, Array* out) {
  const py::tuple shape = object.attr("shape");
  if (!object.attr("is_cpu").cast<bool>() || shape.size() > size_t(Array::kDims) ||
      !py::str(object.attr("layout")).equal(py::str("torch.strided")) ||
      !object.attr("is_floating_point")().cast<bool>())
    return false;
  const py::tuple strides = object.attr("stride")();
  out->itemsize = object.attr("element_size")().cast<int>();
  if (out->itemsize < 2) return false;  // float8
  out->bfloat16 = py::str(object.attr("dtype")).equal(py::str("torch.bfloat16"));
  out->data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  out->dims = int(shape.size());
  for (int d = 0; d < out->dims; ++d) {
    out->shape[d] = shape[size_t(d)].cast<int64_t>();
    out->step[d] = strides[size_t(d)].cast<int64_t>();
  }
  return in_memory(object, *out);
}

}  // namespace detail

inline bool is_torch(pybind11::handle object) {
  return Py_TYPE(object.ptr()) == torch.tensor || Py_TYPE(object.ptr()) == torch.parameter;
}

inline bool is_exactly_numpy(pybind11::handle object) {
  return Py_TYPE(object.ptr()) == pybind11::detail::npy_api::get().PyArray_Type_;
}

// The array behind `object`; false where it is none of floats in this CPU's memory. Half precision
// is torch's only.
inline bool view(pybind11::handle object, Array* out) {
  if (is_torch(object))
    return torch.exchange ? detail::view_dlpack(object, out) : detail::view_attributes(object, out);
  return pybind11::isinstance<pybind11::array>(object) && detail::view_numpy(object, out);
}

}  // namespace fastlstm

namespace pybind11::detail {
template <>
struct type_caster<fastlstm::Array> {
  PYBIND11_TYPE_CASTER(fastlstm::Array, const_name("numpy.ndarray | torch.Tensor | None"));
  bool load(handle source, bool) { return source.is_none() || fastlstm::view(source, &value); }
};
}  // namespace pybind11::detail
