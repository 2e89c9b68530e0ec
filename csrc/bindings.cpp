// The only pybind11 file: turns Python arguments into the structs of lstm.h, releases the GIL,
// calls. It checks nothing: python/fastlstm/ has checked and allocated everything.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "lstm.h"
#include "plan.h"

namespace py = pybind11;

namespace {

// The memory of an argument: a NumPy array, an address (torch's data_ptr()), or None for null.
struct Address {
  void* data = nullptr;
};

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("numpy.ndarray | int | None"));
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (PyLong_Check(source.ptr())) {
      value.data = PyLong_AsVoidPtr(source.ptr());
      return !PyErr_Occurred();
    }
    if (!isinstance<array>(source)) return false;
    value.data = array_proxy(source.ptr())->data;
    return true;
  }
};
}  // namespace pybind11::detail

namespace {

using namespace fastlstm;

template <class T>
T* as(Address address) {
  return static_cast<T*>(address.data);
}

// f with a null pointer of the element type that `itemsize` names.
template <class F>
auto with_type(int itemsize, F&& f) {
  return itemsize == 4 ? f(static_cast<float*>(nullptr)) : f(static_cast<double*>(nullptr));
}

void run_forward(int itemsize, int threads, int64_t T, int64_t N, int64_t D, int64_t H,
                 bool reverse, Address w_ih, Address w_hh, Address b_ih, Address b_hh, Address x,
                 int64_t x_t, int64_t x_n, Address h0, Address c0, Address y, int64_t y_t,
                 int64_t y_n, Address h_n, Address c_n, Address gates, Address cells) {
  py::gil_scoped_release release;
  with_type(itemsize, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    forward<E>({{T, N, D, H},
                {as<E>(w_ih), as<E>(w_hh), as<E>(b_ih), as<E>(b_hh), reverse},
                {as<E>(x), x_t, x_n, N},
                as<E>(h0),
                as<E>(c0),
                {as<E>(y), y_t, y_n, N},
                as<E>(h_n),
                as<E>(c_n),
                as<E>(gates),
                as<E>(cells)},
               threads);
  });
}

void run_backward(int itemsize, int threads, int64_t T, int64_t N, int64_t D, int64_t H,
                  bool reverse, Address w_ih, Address w_hh, Address x, int64_t x_t, int64_t x_n,
                  Address h0, Address c0, Address y, int64_t y_t, int64_t y_n, Address gates,
                  Address cells, Address grad_y, int64_t grad_y_t, int64_t grad_y_n, Address grad_h,
                  Address grad_c, Address dx, int64_t dx_t, int64_t dx_n, Address dw_ih,
                  Address dw_hh, Address db, Address dh0, Address dc0) {
  py::gil_scoped_release release;
  with_type(itemsize, [&](auto* type) {
    using E = std::remove_pointer_t<decltype(type)>;
    backward<E>({{T, N, D, H},
                 {as<E>(w_ih), as<E>(w_hh), nullptr, nullptr, reverse},
                 {as<E>(x), x_t, x_n, N},
                 as<E>(h0),
                 as<E>(c0),
                 {as<E>(y), y_t, y_n, N},
                 as<E>(gates),
                 as<E>(cells),
                 {as<E>(grad_y), grad_y_t, grad_y_n, N},
                 as<E>(grad_h),
                 as<E>(grad_c),
                 {as<E>(dx), dx_t, dx_n, N},
                 as<E>(dw_ih),
                 as<E>(dw_hh),
                 as<E>(db),
                 as<E>(dh0),
                 as<E>(dc0)},
                threads);
  });
}

Machine machine(int itemsize) {
  return with_type(itemsize, [&](auto* type) {
    const auto& kernel = kernels<std::remove_pointer_t<decltype(type)>>();
    return Machine{kernel.lanes, itemsize};
  });
}

py::dict show_plan(int64_t T, int64_t N, int64_t D, int64_t H, int threads, int itemsize,
                   bool backward) {
  const Plan plan =
      (backward ? plan_backward : plan_forward)({T, N, D, H}, machine(itemsize), threads);
  py::dict shown;
  shown["row_groups"] = plan.row_groups;
  shown["panel_groups"] = plan.panel_groups;
  shown["threads"] = plan.threads();
  shown["direct"] = plan.direct;
  shown["input_in_step"] = plan.input_in_step;
  shown["block"] = plan.block;
  return shown;
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
  py::gil_scoped_release release;
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

  m.def("default_threads", &default_threads);
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", &active_isa);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("plan", &show_plan, py::arg("T"), py::arg("N"), py::arg("D"), py::arg("H"),
        py::arg("threads"), py::arg("itemsize"), py::arg("backward"));
  m.def("map", &map<float>, py::arg("function"), py::arg("x").noconvert());
  m.def("map", &map<double>, py::arg("function"), py::arg("x").noconvert());
  m.def("fma_peak", &fma_peak, py::arg("threads"), py::arg("itemsize"));

  m.attr("__version__") = FASTLSTM_VERSION;
  m.attr("compiler") = FASTLSTM_COMPILER;
  m.attr("openmp") = openmp_runtime();
}
