// The pybind11 module: turns Python arguments into the structs of lstm.h, releases the GIL,
// calls. It checks what a caller passes in one place, read(), and what may have changed since in
// another, Given; the rest trusts what python/fastlstm/ checked. For torch it allocates too.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "arrays.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "gil.h"
#include "half.h"
#include "lstm.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using namespace fastlstm;

// f with a null pointer of the element type that `itemsize` names.
template <class F>
auto with_type(int itemsize, F&& f) {
  return itemsize == 8 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

// Element `place` of an array, or null for none.
template <class T>
T* at(const Array& array, int64_t place) {
  return array.data ? static_cast<T*>(array.data) + place : nullptr;
}
// Rows of a (T, N, columns) array, or of a (rows, columns) one, from column `place` on.
template <class T>
Rows<T> rows(const Array& array, int64_t place = 0) {
  const int d = array.dims - 2;
  if (d < 0) return {};
  return {at<T>(array, place), d ? array.step[0] : 0, array.step[d], array.shape[d]};
}

using Arrays = std::vector<Array>;

// Sizes of the first layer and, where the batch is ragged, its rows. x: (T, N, D), (N, D) for a
// cell, or (rows, D) with `batch_sizes`, the rows at each time.
struct Shape {
  Sizes sizes;
  int64_t rows;                              // of an array over time
  std::vector<int64_t> counts[2], first[2];  // in order of computation, for each way of time

  Shape(const Array& x, const Arrays& weights, const std::vector<int64_t>& batch_sizes) {
    const int d = x.dims - 2;
    const int64_t D = x.shape[d + 1], H = weights[0].shape[0] / 4, P = weights[1].shape[1];
    rows = (d ? x.shape[0] : 1) * x.shape[d];
    sizes = {d ? x.shape[0] : 1, x.shape[d], D, H, P};
    if (batch_sizes.empty()) return;
    sizes = {int64_t(batch_sizes.size()), batch_sizes[0], D, H, P};
    counts[0] = batch_sizes;
    first[0].resize(batch_sizes.size());
    std::partial_sum(batch_sizes.begin(), batch_sizes.end() - 1, first[0].begin() + 1);
    counts[1].assign(counts[0].rbegin(), counts[0].rend());
    first[1].assign(first[0].rbegin(), first[0].rend());
  }
  Ragged ragged(bool reverse) const {
    if (counts[0].empty()) return {};
    return {counts[reverse].data(), first[reverse].data()};
  }
};

// Part k of `parts`, the directions of each layer in turn, whose weights stand one part after the
// other: W_ih, W_hh, b_ih and b_hh if it has biases, W_hr if it has a projection. The same for
// their gradients.
struct Weights {
  const Array *ih, *hh, *b_ih = nullptr, *b_hh = nullptr, *hr = nullptr;

  Weights(const Arrays& arrays, int parts, int k) {
    const size_t count = arrays.size() / size_t(parts);
    const Array* w = arrays.data() + size_t(k) * count;
    ih = w;
    hh = w + 1;
    if (count >= 4) {
      b_ih = w + 2;
      b_hh = w + 3;
    }
    if (count % 2) hr = w + count - 1;
  }
};
template <class T>
T* start(const Array* array) {
  return array ? at<T>(*array, 0) : nullptr;
}
template <class T>
Matrix<T> matrix(const Array* array) {
  if (!array) return {};
  return {array->data, element_of(*array)};
}
template <class T>
Layer<T> layer(const Arrays& weights, int parts, int k, bool reverse) {
  const Weights w(weights, parts, k);
  return {matrix<T>(w.ih),        matrix<T>(w.hh), start<const T>(w.b_ih),
          start<const T>(w.b_hh), matrix<T>(w.hr), reverse};
}

// Whether all that is there is bfloat16.
bool in_bf16(const Arrays& arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const Array& array) { return !array.data || array.bfloat16; });
}

// `parts` are the directions of all layers, of which x and y have `directions`. Arrays of float32
// may come in half precision each.
void run_parts(Array x, Array h0, Array c0, Arrays weights, Array y, Array h_n, Array c_n,
               Array gates, Array cells, Array raw, const std::vector<int64_t>& batch_sizes,
               bool reverse, int parts, int directions, int threads) {
  for (const Array* array : {&y, &gates, &cells, &raw})
    prefer_huge_pages(array->data, array->bytes());
  const bool exact = in_bf16({x}) && in_bf16(weights);
  InFloat32 floats(threads);
  for (Array* array : {&x, &h0, &c0}) floats.input(array);
  for (Array& weight : weights)
    if (weight.dims == 1) floats.input(&weight);
  for (Array* array : {&y, &h_n, &c_n, &cells, &raw}) floats.output(array);
  floats.read();
  with_type(y.itemsize, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const Shape shape(x, weights, batch_sizes);
    const auto [T, N, D, H, P] = shape.sizes;
    std::vector<Forward<E>> passes(static_cast<size_t>(parts));
    for (int k = 0; k < parts; ++k) {
      const int d = k % directions;
      const bool backwards = reverse || d == 1;
      passes[size_t(k)] = {{T, N, k < directions ? D : directions * P, H, P},
                           exact,
                           shape.ragged(backwards),
                           layer<E>(weights, parts, k, backwards),
                           rows<const E>(x),
                           at<const E>(h0, k * N * P),
                           at<const E>(c0, k * N * H),
                           rows<E>(y, d * P),
                           at<E>(h_n, k * N * P),
                           at<E>(c_n, k * N * H),
                           gates.half() ? nullptr : at<E>(gates, k * shape.rows * 4 * H),
                           gates.half() ? at<Float16>(gates, k * shape.rows * 4 * H) : nullptr,
                           at<E>(cells, k * shape.rows * H),
                           at<E>(raw, k * shape.rows * H)};
    }
    forward(passes.data(), parts / directions, directions, threads);
  });
  floats.write();
}

void run_forward(Array x, Array h0, Array c0, Arrays weights, Array y, Array h_n, Array c_n,
                 Array gates, Array cells, Array raw, const std::vector<int64_t>& batch_sizes,
                 bool reverse, int threads) {
  const GilReleased released;
  const int directions = int(y.shape[y.dims - 1] / weights[1].shape[1]);
  const int parts = h_n.dims == 3 ? int(h_n.shape[0]) : 1;
  run_parts(x, h0, c0, std::move(weights), y, h_n, c_n, gates, cells, raw, batch_sizes, reverse,
            parts, directions, threads);
}

void run_backward(Array x, Array h0, Array c0, const Arrays& weights, Array y, Array gates,
                  Array cells, Array raw, Array grad_y, Array grad_h, Array grad_c, Array dx,
                  Arrays dweights, Array dh0, Array dc0, const Array& dz,
                  const std::vector<int64_t>& batch_sizes, bool reverse, int threads) {
  const GilReleased released;
  const int directions = gates.dims > 2 ? int(gates.shape[0]) : 1;  // none of a cell
  prefer_huge_pages(dx.data, dx.bytes());
  for (const Array& array : dweights) prefer_huge_pages(array.data, array.bytes());
  const bool exact = in_bf16({x, h0, y, raw}) && in_bf16(weights);
  InFloat32 floats(threads);
  for (Array* array : {&x, &h0, &c0, &y, &cells, &raw, &grad_y, &grad_h, &grad_c})
    floats.input(array);
  for (Array* array : {&dx, &dh0, &dc0}) floats.output(array);
  for (Array& array : dweights) floats.output(&array);
  floats.read();
  with_type(x.itemsize, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const Shape shape(x, weights, batch_sizes);
    const auto [T, N, D, H, P] = shape.sizes;
    Backward<E> passes[2];
    for (int d = 0; d < directions; ++d) {
      const Weights dw(dweights, directions, d);
      const bool biases = dw.b_ih != nullptr;
      passes[d] = {shape.sizes,
                   exact,
                   shape.ragged(reverse || d == 1),
                   layer<E>(weights, directions, d, reverse || d == 1),
                   rows<const E>(x),
                   at<const E>(h0, d * N * P),
                   at<const E>(c0, d * N * H),
                   rows<const E>(y, d * P),
                   gates.half() ? nullptr : at<const E>(gates, d * shape.rows * 4 * H),
                   gates.half() ? at<const Float16>(gates, d * shape.rows * 4 * H) : nullptr,
                   at<const E>(cells, d * shape.rows * H),
                   at<const E>(raw, d * shape.rows * H),
                   rows<const E>(grad_y, d * P),
                   at<const E>(grad_h, d * N * P),
                   at<const E>(grad_c, d * N * H),
                   {at<E>(dx, d * shape.rows * D), N * D, D, N},
                   start<E>(dw.ih),
                   start<E>(dw.hh),
                   biases && dw.b_ih->data ? start<E>(dw.b_ih) : start<E>(dw.b_hh),
                   start<E>(dw.hr),
                   at<E>(dh0, d * N * P),
                   at<E>(dc0, d * N * H),
                   at<E>(dz, 0)};
    }
    backward(passes, directions, threads);
    // Both biases have the same gradient.
    for (int d = 0; d < directions; ++d) {
      const Weights dw(dweights, directions, d);
      if (dw.b_ih && dw.b_ih->data && dw.b_hh->data)
        std::copy_n(start<E>(dw.b_ih), 4 * H, start<E>(dw.b_hh));
    }
  });
  floats.write();
}

// What a layer or a cell is made for. P is proj_size, or 0; `dims` is that of a batched x: 3, or 2
// for a cell.
struct Made {
  int64_t D, H, P, layers, directions;
  bool batch_first;
  int dims;

  int64_t output() const { return P ? P : H; }
  int64_t parts() const { return layers * directions; }
};

// The tensors of a call, in their own layout.
struct Call {
  Array x, h0, c0;
  Arrays weights;
  int64_t T, N;
  bool batched;
};

// Whether a tensor is a view whose memory holds the numbers negated.
bool negated(py::handle tensor) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* const found = PyObject_CallMethodNoArgs(tensor.ptr(), is_neg);
  if (!found) PyErr_Clear();
  Py_XDECREF(found);
  return found != Py_False;
}

// Reads a call that can run as it stands: every array of the one dtype, of the shape it must have,
// and laid out as the kernels read it. False where it cannot. `packed` is the batch of a ragged x
// (rows, D), or 0.
bool read(py::handle x, py::handle state, py::handle weights, const Made& made, int64_t packed,
          Call* call) {
  const auto [D, H, P, layers, directions, batch_first, dims] = made;
  Array& input = call->x;
  const auto plain = [&](py::handle object, Array* array) {
    if (!view(object, array) || !array->same_dtype(input)) return false;
    if (is_torch(object) != is_torch(x)) return false;
    if (!is_torch(object)) return is_exactly_numpy(object);
    return !negated(object);
  };
  const auto is = [&](py::handle object, Array* array, std::initializer_list<int64_t> shape) {
    return plain(object, array) && array->dims == int(shape.size()) &&
           std::equal(shape.begin(), shape.end(), array->shape) && array->packed();
  };
  if (D < 1 || H < 1 || P < 0 || layers < 1 || directions < 1) return false;
  if (!view(x, &input) || !plain(x, &input)) return false;
  if ((input.dims != dims && input.dims != dims - 1) || input.shape[input.dims - 1] != D ||
      !input.has_rows())
    return false;
  if (packed && input.dims != 2) return false;
  const bool batched = call->batched = packed || input.dims == dims;
  const int batch_dim = dims == 3 && !batch_first;
  const int64_t N = call->N = packed ? packed : batched ? input.shape[batch_dim] : 1;
  const int64_t T = call->T =
      dims == 2 ? 1 : input.shape[batched && batch_first && !packed ? 1 : 0];
  if (T < 1 || N < 1) return false;
  // Far from what could be addressed; see sizes() in _check.py.
  if (double(T) * double(N + 1) * double(D + directions * H + 64) > 1e15) return false;
  const int64_t output = made.output();

  // One whose items are also what it is unpacked to.
  const auto pair = [](py::handle object) {
    const auto iter = Py_TYPE(object.ptr())->tp_iter;
    return ((PyTuple_Check(object.ptr()) && iter == PyTuple_Type.tp_iter) ||
            (PyList_Check(object.ptr()) && iter == PyList_Type.tp_iter)) &&
           PySequence_Fast_GET_SIZE(object.ptr()) == 2;
  };
  if (!state.is_none()) {
    if (!pair(state)) return false;
    const int64_t count = made.parts();
    for (int k = 0; k < 2; ++k) {
      const py::handle part = PySequence_Fast_GET_ITEM(state.ptr(), k);
      Array* const array = k == 0 ? &call->h0 : &call->c0;
      const int64_t columns = k == 0 ? output : H;
      const bool right = dims == 3 ? batched ? is(part, array, {count, N, columns})
                                             : is(part, array, {count, columns})
                         : batched ? is(part, array, {N, columns})
                                   : is(part, array, {columns});
      if (!right) return false;
    }
  }
  if (!PyList_Check(weights.ptr())) return false;
  const int64_t per_direction = PyList_GET_SIZE(weights.ptr()) / made.parts();
  const bool biases = per_direction >= 4;
  if (per_direction != (biases ? 4 : 2) + (P > 0)) return false;
  call->weights.resize(size_t(made.parts() * per_direction));
  for (int64_t k = 0; k < made.parts() * per_direction; ++k) {
    const int64_t kind = k % per_direction;
    const bool first_layer = k < directions * per_direction;
    const py::handle weight = PyList_GET_ITEM(weights.ptr(), k);
    Array* const array = &call->weights[size_t(k)];
    const bool right = kind == 0 ? is(weight, array, {4 * H, first_layer ? D : directions * output})
                       : kind == 1          ? is(weight, array, {4 * H, output})
                       : biases && kind < 4 ? is(weight, array, {4 * H})
                                            : is(weight, array, {P, H});
    if (!right) return false;
  }
  return true;
}

// Runs layers of which nothing is kept. In half precision one by one, so that each reads the output
// of the one below rounded to it, as it does where layers are calls of their own.
void run_layers(Array x, Array h0, Array c0, Arrays weights, Array y, Array h_n, Array c_n,
                const std::vector<int64_t>& batch_sizes, int layers, int directions, int threads) {
  const GilReleased released;
  if (layers == 1 || !y.half())
    return run_parts(x, h0, c0, std::move(weights), y, h_n, c_n, {}, {}, {}, batch_sizes, false,
                     layers * directions, directions, threads);
  const auto part = [&](const Array& states, int k) {
    Array some = states;
    if (!some.data) return some;
    some.shape[0] = directions;
    some.data = at<BFloat16>(states, k * directions * states.step[0]);
    return some;
  };
  const auto per_layer = ptrdiff_t(weights.size()) / layers;
  const Block between(y.bytes());  // a pass has read its input before it writes
  for (int k = 0; k < layers; ++k) {
    Array out = y;
    if (k < layers - 1) out.data = between.data();
    const auto first = weights.begin() + k * per_layer;
    run_parts(x, part(h0, k), part(c0, k), {first, first + per_layer}, out, part(h_n, k),
              part(c_n, k), {}, {}, {}, batch_sizes, false, directions, directions, threads);
    x = out;
  }
}

// What is there of an argument; nothing of None.
Array array_of(py::handle object, const char* name) {
  Array array;
  if (!object.is_none() && !view(object, &array))
    throw py::type_error(std::string(name) + ": expected a tensor of floats in this CPU's memory" +
                         ", got " + Py_TYPE(object.ptr())->tp_name);
  return array;
}

// A torch tensor like `like` but for its shape, of which sizes below zero are left out. What only a
// step of training needs (`of_step`) has, if large, memory of an earlier one.
py::object new_tensor(py::handle like, int itemsize, std::initializer_list<int64_t> shape,
                      Array* array, bool of_step = false) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  // Sizes one by one, which torch reads faster than a tuple.
  py::object sizes[Array::kDims];
  PyObject* given[1 + Array::kDims] = {like.ptr()};
  size_t count = 1;
  double bytes = itemsize;
  for (const int64_t size : shape) {
    if (size < 0) continue;
    sizes[count - 1] = py::int_(size);
    given[count] = sizes[count - 1].ptr();
    bytes *= double(size);
    ++count;
  }
  PyObject* const found = of_step && bytes >= double(Block::kLarge)
                              ? PyObject_Vectorcall(torch.memory, given, count, nullptr)
                              : PyObject_VectorcallMethod(new_empty, given, count, nullptr);
  if (!found) throw py::error_already_set();
  py::object tensor = py::reinterpret_steal<py::object>(found);
  if (!view(tensor, array)) throw std::runtime_error("new_empty: no memory to write");
  return tensor;
}

// Whether read() would. True spares the thorough checks in Python; false says nothing.
bool fits(py::handle x, py::handle state, py::handle weights, int64_t D, int64_t H, int64_t P,
          int64_t layers, int64_t directions, bool batch_first, int dims, int64_t packed) {
  Call call;
  return read(x, state, weights, {D, H, P, layers, directions, batch_first, dims}, packed, &call);
}

// A call on torch tensors from check to result, without gradients, where it can run as it stands:
// y with time first and (h_n, c_n); (h, c) of a cell. None where it cannot. Python takes longer for
// its part of this than the kernels do for a small step.
py::object infer(py::handle x, py::handle state, py::handle weights, int64_t D, int64_t H,
                 int64_t P, int64_t layers, int64_t directions, bool batch_first, int dims,
                 int64_t packed, const std::vector<int64_t>& batch_sizes, int threads) {
  const Made made{D, H, P, layers, directions, batch_first, dims};
  // The caller's list may change while the GIL is not held.
  const py::object states = py::isinstance<py::list>(state)
                                ? py::tuple(py::reinterpret_borrow<py::list>(state))
                                : py::reinterpret_borrow<py::object>(state);
  Call call;
  if (!read(x, states, weights, made, packed, &call) || !is_torch(x)) return py::none();
  const int64_t output = made.output(), parts = made.parts();
  const int64_t batch = call.batched ? call.N : -1;
  Array input = call.x, y, h_n, c_n;
  py::object results[3];
  if (dims == 2) {
    results[1] = new_tensor(x, call.x.itemsize, {batch, H}, &y);
    results[2] = new_tensor(x, call.x.itemsize, {batch, H}, &c_n);
  } else {
    const int64_t rows = packed ? call.x.shape[0] : call.T;
    results[0] =
        new_tensor(x, call.x.itemsize, {rows, packed ? -1 : batch, directions * output}, &y);
    results[1] = new_tensor(x, call.x.itemsize, {parts, batch, output}, &h_n);
    results[2] = new_tensor(x, call.x.itemsize, {parts, batch, H}, &c_n);
  }
  if (!call.batched) {
    input = input.with_one(dims - 2);
    y = y.with_one(dims - 2);
  } else if (batch_first && !packed) {
    input = input.swapped();
  }
  run_layers(input, call.h0, call.c0, std::move(call.weights), y, h_n, c_n, batch_sizes,
             int(layers), int(directions), threads);
  const py::object last = py::make_tuple(results[1], results[2]);
  return dims == 2 ? last : py::make_tuple(results[0], last);
}

std::string described(const Array& array) {
  std::string text = array.itemsize == 8   ? "float64"
                     : array.itemsize == 4 ? "float32"
                     : array.bfloat16      ? "bfloat16"
                                           : "float16";
  for (int d = 0; d < array.dims; ++d) text += (d ? ", " : " (") + std::to_string(array.shape[d]);
  return text + (array.dims ? ")" : " ()");
}

// The tensors of a layer or a cell as the kernels read them. They may differ from those that were
// checked when a call began, or that the forward pass saved: hooks of saved tensors give back what
// they like, and whoever has a parameter can set its `data` there or between the passes.
class Given {
 public:
  // What all is measured by: x (T, N, D), (rows, D) where ragged, or of a cell (N, D); W_ih, W_hh.
  Given(py::handle x, const py::list& weights, int directions,
        const std::vector<int64_t>& batch_sizes, bool backward)
      : backward_(backward), per_(weights.size() / size_t(directions)), x_(array_of(x, "x")) {
    const bool ragged = !batch_sizes.empty(), cell = x_.dims == 2 && !ragged;
    if (x_.dims != (cell || ragged ? 2 : 3) ||
        (ragged &&
         std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t(0)) != x_.shape[0]))
      refuse("x", "(T, N, D), (rows, D) or (N, D)", x_);
    const auto one = [](int64_t size) { return std::max<int64_t>(size, 1); };  // only N may be 0
    D = one(x_.shape[x_.dims - 1]);
    H = one(array_of(weights[0], "weight_ih").shape[0] / 4);
    P = per_ % 2 ? one(array_of(weights[1], "weight_hh").shape[1]) : H;
    N = ragged ? batch_sizes[0] : x_.shape[x_.dims - 2];
    T = cell ? -1 : one(x_.shape[0]);
    batch = ragged ? -1 : N;
    lead = cell ? -1 : directions;
  }
  // As shapes: T and batch of an array over time, lead of a state; below zero they are left out.
  int64_t T, N, D, H, P, batch, lead;
  bool cell() const { return lead < 0; }
  int itemsize() const { return x_.itemsize; }

  Arrays inputs(py::handle x, py::handle h0, py::handle c0, const py::list& weights) {
    Arrays found = {(*this)(x, "x", {T, batch, D}, true), (*this)(h0, "h0", {lead, N, P}),
                    (*this)(c0, "c0", {lead, N, H})};
    for (size_t k = 0; k < weights.size(); ++k) {
      const size_t kind = k % per_;
      found.push_back(kind == 0               ? (*this)(weights[k], "weight_ih", {4 * H, D})
                      : kind == 1             ? (*this)(weights[k], "weight_hh", {4 * H, P})
                      : kind < 4 && per_ >= 4 ? (*this)(weights[k], "bias", {4 * H})
                                              : (*this)(weights[k], "weight_hr", {P, H}));
    }
    return found;
  }

  // The array of a tensor or None: of x's dtype and of this shape, from which sizes below zero are
  // left out. Contiguous or, with `strided`, only its rows.
  Array operator()(py::handle tensor, const char* name, std::initializer_list<int64_t> shape,
                   bool strided = false) {
    Array array = array_of(tensor, name);
    if (tensor.is_none()) return array;
    Array fitting = x_;
    fitting.dims = 0;
    for (const int64_t size : shape)
      if (size >= 0) fitting.shape[fitting.dims++] = size;
    if (!array.same_dtype(x_) || array.dims != fitting.dims ||
        !std::equal(array.shape, array.shape + array.dims, fitting.shape))
      refuse(name, described(fitting), array);
    if ((strided ? array.has_rows() : array.packed()) && !negated(tensor)) return array;
    copies_.push_back(tensor.attr("resolve_neg")().attr("contiguous")());
    return array_of(copies_.back(), name);
  }

 private:
  [[noreturn]] void refuse(const std::string& name, const std::string& expected,
                           const Array& got) const {
    throw std::runtime_error(name + ": expected " +
                             (backward_ ? "in the backward pass as it was in the forward one, "
                                        : "as it was when the call began, ") +
                             expected + ", got " + described(got));
  }

  const bool backward_;
  const size_t per_;  // weights of a direction
  const Array x_;
  std::vector<py::object> copies_;
};

// One layer, or a step of a cell, whose x (N, D) has no time, on torch tensors that the kernels can
// read: y, h_n, c_n and, with `keep`, gates, cells and h before a projection. See
// _torch.run_forward. Of a cell y is h, and there is no h_n.
py::tuple run_layer(py::handle x, py::handle h0, py::handle c0, const py::list& weights,
                    int directions, const std::vector<int64_t>& batch_sizes, bool keep,
                    int threads) {
  Given given(x, weights, directions, batch_sizes, false);
  const Arrays inputs = given.inputs(x, h0, c0, weights);
  const int itemsize = given.itemsize();
  const int64_t T = given.T, N = given.N, H = given.H, P = given.P;
  const int64_t batch = given.batch, lead = given.lead;
  Array y, h_n, c_n, gates, cells, raw;
  py::tuple found(6);
  for (size_t k = 0; k < found.size(); ++k) found[k] = py::none();
  found[0] = new_tensor(x, itemsize, {T, batch, directions * P}, &y);
  if (!given.cell()) found[1] = new_tensor(x, itemsize, {lead, N, P}, &h_n);
  found[2] = new_tensor(x, itemsize, {lead, N, H}, &c_n);
  if (keep) {
    found[3] = new_tensor(x, itemsize, {lead, T, batch, 4 * H}, &gates, true);
    found[4] = new_tensor(x, itemsize, {lead, T, batch, H}, &cells, true);
    if (weights.size() / size_t(directions) % 2)
      found[5] = new_tensor(x, itemsize, {lead, T, batch, H}, &raw, true);
  }
  run_forward(inputs[0], inputs[1], inputs[2], {inputs.begin() + 3, inputs.end()}, y, h_n, c_n,
              gates, cells, raw, batch_sizes, false, threads);
  return found;
}

// The gradients of x, h0, c0 and the weights that are `needed`, None for the others, from what
// run_layer was given and returned; then, with `keep_dz`, that of the pre-activations of a single
// step, for weight_gradients(). `dx` is memory for that of x, or None for new memory.
py::tuple run_layer_backward(py::handle x, py::handle h0, py::handle c0, const py::list& weights,
                             py::handle y, py::handle gates, py::handle cells, py::handle raw,
                             py::handle grad_y, py::handle grad_h, py::handle grad_c, py::handle dx,
                             const std::vector<bool>& needed, bool keep_dz, int directions,
                             const std::vector<int64_t>& batch_sizes, int threads) {
  Given given(x, weights, directions, batch_sizes, true);
  const Arrays inputs = given.inputs(x, h0, c0, weights);
  const int itemsize = given.itemsize();
  const int64_t T = given.T, N = given.N, H = given.H, P = given.P;
  const int64_t batch = given.batch, lead = given.lead;
  const Array output = given(y, "y", {T, batch, directions * P});
  const Array kept[] = {given(gates, "gates", {lead, T, batch, 4 * H}),
                        given(cells, "cells", {lead, T, batch, H}),
                        given(raw, "h before the projection", {lead, T, batch, H})};
  const Array due[] = {given(grad_y, "grad_y", {T, batch, directions * P}, true),
                       given(grad_h, "grad_h", {lead, N, P}),
                       given(grad_c, "grad_c", {lead, N, H})};

  std::vector<py::handle> of = {x, h0, c0};
  of.insert(of.end(), weights.begin(), weights.end());
  const size_t count = of.size();
  py::tuple found(count + keep_dz);
  Arrays grads(count);
  Array dz;
  for (size_t k = 0; k < count; ++k) {
    found[k] = py::none();
    if (!needed[k]) continue;
    const auto size = [&](int d) { return d < inputs[k].dims ? inputs[k].shape[d] : -1; };
    if (k == 0 && !dx.is_none()) {
      grads[k] = array_of(dx, "dx");
      found[k] = dx;
    } else {
      found[k] =
          new_tensor(of[k], itemsize, {size(0), size(1), size(2), size(3)}, &grads[k], k >= 3);
    }
  }
  if (keep_dz) found[count] = new_tensor(x, itemsize, {N, 4 * H}, &dz, true);
  run_backward(inputs[0], inputs[1], inputs[2], {inputs.begin() + 3, inputs.end()}, output, kept[0],
               kept[1], kept[2], due[0], due[1], due[2], grads[0], {grads.begin() + 3, grads.end()},
               grads[1], grads[2], dz, batch_sizes, false, threads);
  return found;
}

// The gradients of the weights of steps without a projection, two or four, that are `needed`, None
// for the others: from x (rows, D), h before the step (rows, H) and dz (rows, 4H) of all their
// rows.
py::list weight_gradients(const Array& x, const Array& h, py::handle dz,
                          const std::vector<bool>& needed, int threads) {
  const Array z = array_of(dz, "dz");
  for (const Array& factor : {x, h})
    if (factor.dims != 2 || factor.shape[0] != z.shape[0] || !factor.same_dtype(z))
      throw std::runtime_error("x or h of a step: expected as many rows as " + described(z) +
                               ", got " + described(factor));
  const int64_t columns[] = {x.shape[1], h.shape[1], -1, -1};
  py::list found;
  Arrays weights(needed.size()), grads(needed.size());
  for (size_t k = 0; k < needed.size(); ++k) {
    weights[k].shape[0] = z.shape[1];
    weights[k].shape[1] = columns[k];
    found.append(needed[k] ? new_tensor(dz, z.itemsize, {z.shape[1], columns[k]}, &grads[k], true)
                           : py::none());
  }
  run_backward(x, h, {}, weights, {}, {}, {}, {}, {}, {}, {}, {}, grads, {}, {}, z, {}, false,
               threads);
  return found;
}

void use_torch(py::type tensor, py::type parameter, py::function memory, py::object exchange) {
  const auto* table = exchange.is_none()
                          ? nullptr
                          : static_cast<const dlpack::Exchange*>(
                                PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  PyErr_Clear();
  const bool usable = table && table->version.major == 1 && table->view;
  torch = {(PyTypeObject*)tensor.ptr(), (PyTypeObject*)parameter.ptr(), memory.release().ptr(),
           usable ? table : nullptr};
}

py::dict show_plan(int64_t T, int64_t N, int64_t D, int64_t H, int threads, int itemsize,
                   bool backward, int layers) {
  return with_type(itemsize, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    const Sizes sizes{T, N, D, H, H}, upper{T, N, H, H, H};
    const Machine plain = machine_of(kernels<E>());
    const Use forward = use_forward(sizes, plain, false);
    const Use use = backward ? use_backward(sizes, false) : forward;
    const Use products = backward ? use_products_backward(sizes, false) : use;
    const Machine machine = machine_of(kernels<E>(use));
    const Plan plan = backward
                          ? plan_backward(sizes, machine, machine_of(kernels<E>(products)), threads)
                          : plan_forward(sizes, machine, threads);
    const auto &of_first = kernels<E>(forward),
               &of_upper = kernels<E>(use_forward(upper, plain, false));
    py::dict shown;
    shown["row_groups"] = plan.row_groups;
    shown["panel_groups"] = plan.panel_groups;
    shown["threads"] = plan.threads();
    shown["direct"] = plan.direct;
    shown["across"] = plan.across;
    shown["row_by_row"] = plan.row_by_row;
    shown["floats_on_tiles"] = sizeof(E) == 4 && use == Use::floats_on_tiles;
    shown["products_on_tiles"] = sizeof(E) == 4 && products == Use::floats_on_tiles;
    shown["input_in_step"] = plan.input_in_step;
    shown["pack_at_use"] = plan.pack_at_use;
    shown["block"] = plan.block;
    shown["task"] = plan.task;
    shown["layers_at_once"] = &of_first == &of_upper
                                  ? layers_at_once(upper, D, machine_of(of_upper), layers, threads)
                                  : 1;
    return shown;
  });
}

template <class T>
py::array_t<T> map(const std::string& name, py::array_t<T, py::array::c_style> x) {
  const Function function = name == "exp"       ? Function::exp
                            : name == "sigmoid" ? Function::sigmoid
                            : name == "tanh"    ? Function::tanh
                                                : throw std::invalid_argument("no such function");
  py::array_t<T> y(x.size());
  kernels<T>().map(function, x.data(), y.mutable_data(), x.size());
  return y;
}

// The machine's peak: GFLOP/s of multiply-adds that never leave the registers, all threads at once.
double fma_peak(int threads, int itemsize) {
  const GilReleased released;
  return with_type(itemsize, [&](auto* type) {
    const auto& kernel = kernels<std::remove_pointer_t<decltype(type)>>();
    using Clock = std::chrono::steady_clock;
    double best = 0;
    for (int round = 0; round < 5; ++round) {
      std::atomic<double> total{0};
      const auto start = Clock::now();
      parallel(threads, [&](int) {
        const double done = kernel.fma_loop(1000000);
        for (double seen = total; !total.compare_exchange_weak(seen, seen + done);) {
        }
      });
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      best = std::max(best, total / seconds * 1e-9);
    }
    return best;
  });
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  try {
    use_default_isa();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  watch_fork();

  m.doc() = "The compiled part of fastlstm. Private: use the functions of fastlstm.";
  m.def("forward", &run_forward);
  m.def("backward", &run_backward);
  m.def("fits", &fits);
  m.def("infer", &infer);
  m.def("run_layer", &run_layer);
  m.def("run_layer_backward", &run_layer_backward);
  m.def("weight_gradients", &weight_gradients);
  m.def("use_torch", &use_torch);
  py::class_<Block>(m, "_Block", py::buffer_protocol()).def_buffer([](const Block& block) {
    return py::buffer_info(static_cast<uint8_t*>(block.data()), block.size());
  });
  m.def("block", [](int64_t size) {  // memory of so many bytes, not cleared
    return py::memoryview(py::cast(std::make_unique<Block>(size)));
  });
  m.attr("LARGE") = Block::kLarge;

  m.def("default_threads", &default_threads);
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", &active_isa);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("passes_run_again", [] { return passes_run_again.load(); });
  m.def("plan", &show_plan, py::arg("T"), py::arg("N"), py::arg("D"), py::arg("H"),
        py::arg("threads"), py::arg("itemsize"), py::arg("backward"), py::arg("layers") = 1);
  m.def("map", &map<float>, py::arg("function"), py::arg("x").noconvert());
  m.def("map", &map<double>, py::arg("function"), py::arg("x").noconvert());
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("itemsize"));

  m.attr("__version__") = FASTLSTM_VERSION;
  m.attr("compiler") = FASTLSTM_COMPILER;
  m.attr("openmp") = openmp_runtime();
}
