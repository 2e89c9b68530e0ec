// The pybind11 module fastlstm._cuda: memory comes as addresses, the stream as a number. It checks
// sizes against one another; that the addresses hold what recurrence.h says is the caller's part.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../gil.h"
#include "recurrence.h"

#ifndef FASTLSTM_CUDA_MODULE
#define FASTLSTM_CUDA_MODULE _cuda
#endif
#ifndef FASTLSTM_CUDA_BUILD
#define FASTLSTM_CUDA_BUILD ""
#endif

namespace py = pybind11;

namespace {

using namespace fastlstm::cuda;

Math math_of(const std::string& name) {
  const char* const names[] = {"bf16", "f16", "tf32", "f32", "f64"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return Math(i);
  throw std::invalid_argument("math: expected bf16, f16, tf32, f32 or f64, got " + name);
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void check(const Recurrence& p, Math math, bool backward) {
  expect(p.T > 0 && p.N > 0 && p.H > 0 && p.total > 0 && p.chunks > 0,
         "T, N, H, total, chunks: expected at least 1");
  expect(p.directions == 1 || p.directions == 2, "directions: expected 1 or 2");
  expect(p.threads >= kWarp && p.threads <= kMaxThreads && p.threads % kWarp == 0,
         "threads: expected a multiple of 32 up to 256");
  expect(p.blocks > 0 && p.units > 0 && int64_t(p.blocks) * p.units >= p.H &&
             int64_t(p.blocks - 1) * p.units < p.H,
         "blocks, units: expected just enough blocks for all units");
  expect(p.units <= p.threads, "units: expected no more than threads");
  expect(p.rows > 0 && p.rows <= most_elements(math, p.wide) * rows_of_a_pass(p),
         "rows: expected no more elements than a thread can own");
  expect(p.wide || !on_tensor_cores(math) || layout(p, math, backward).m_tiles <= p.threads / kWarp,
         "wide: expected 1 where a warp has several tiles of units");
  expect(p.groups > 0 && p.groups % p.directions == 0, "groups: expected a multiple of directions");
  expect((p.chunks == 1 || !p.local), "chunks: expected 1 with local");
  expect(!p.local || p.blocks <= 16, "blocks: expected at most 16 with local");
  expect(p.local || p.exchange, "exchange: expected memory");
  const int per_direction = p.groups / p.directions, slices = (p.N + p.rows - 1) / p.rows;
  const int64_t in_turn = (slices + per_direction - 1) / per_direction;
  expect(p.local || p.exchanges == in_turn * (int64_t(p.T) + 1),
         "exchanges: expected T + 1 for each slice of a group");
  for (int d = 0; d < p.directions; ++d) expect(p.weight[d], "weight: expected memory");
  if (backward)
    expect(p.gates && p.cells && p.dz && p.dh0 && p.dc0, "expected gates, cells, dz, dh0, dc0");
  else
    expect(p.gx && p.y && p.h_n && p.c_n && !p.gates == !p.cells,
           "expected gx, y, h_n, c_n, both gates and cells or none");
}

void check(const Pointwise& p, Math, bool backward) {
  expect(p.n > 0 && p.H > 0 && p.c, "n, H, c: expected a step");
  if (backward)
    expect(p.gates && p.cells && p.dh && p.dz && p.before >= 0, "expected gates, cells, dh, dz");
  else
    expect(p.z && p.h, "expected z, h");
}

// Fills the fields of a Params from keyword arguments.
class Fields {
 public:
  explicit Fields(const py::dict& given) : given_(given) {}
  template <class T>
  void operator()(const char* name, T& field) {
    if (!given_.contains(name)) return;
    ++taken_;
    const py::object value = given_[name];
    if constexpr (std::is_pointer_v<T>)
      field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<std::uintptr_t>());
    else
      field = value.cast<T>();
  }
  void finish() const {
    if (taken_ != given_.size()) throw std::invalid_argument("unknown keyword argument");
  }

 private:
  const py::dict& given_;
  size_t taken_ = 0;
};

void fill(Recurrence& p, Fields& field) {
  field("T", p.T);
  field("N", p.N);
  field("H", p.H);
  field("directions", p.directions);
  field("threads", p.threads);
  field("blocks", p.blocks);
  field("units", p.units);
  field("rows", p.rows);
  field("groups", p.groups);
  field("chunks", p.chunks);
  field("local", p.local);
  field("wide", p.wide);
  field("offsets", p.offsets);
  field("total", p.total);
  field("weight", p.weight[0]);
  field("weight_reverse", p.weight[1]);
  field("bias", p.bias[0]);
  field("bias_reverse", p.bias[1]);
  field("exchange", p.exchange);
  field("exchanges", p.exchanges);
  field("gates", p.gates);
  field("cells", p.cells);
  field("c0", p.c0);
  field("h0", p.h0);
  field("gx", p.gx);
  field("y", p.y);
  field("h_n", p.h_n);
  field("c_n", p.c_n);
  field("grad_y", p.grad_y);
  field("grad_h", p.grad_h);
  field("grad_c", p.grad_c);
  field("dz", p.dz);
  field("dh0", p.dh0);
  field("dc0", p.dc0);
}

void fill(Pointwise& p, Fields& field) {
  field("n", p.n);
  field("H", p.H);
  field("before", p.before);
  field("y_stride", p.y_stride);
  field("z", p.z);
  field("c", p.c);
  field("h", p.h);
  field("y", p.y);
  field("gates", p.gates);
  field("cells", p.cells);
  field("cells_before", p.cells_before);
  field("c0", p.c0);
  field("dh", p.dh);
  field("grad_y", p.grad_y);
  field("dz", p.dz);
}

template <class Params>
void call(const std::string& math, bool backward, int device, std::uintptr_t stream,
          const py::kwargs& given) {
  Params p;
  Fields fields(given);
  fill(p, fields);
  fields.finish();
  const Math m = math_of(math);
  check(p, m, backward);
  const fastlstm::GilReleased released;
  run(p, m, backward, device, reinterpret_cast<void*>(stream));
}

// Bytes of shared memory that a block takes, of an operand in the exchange, of a block's weights in
// shared memory.
py::tuple memory(const std::string& math, bool backward, const py::kwargs& given) {
  Recurrence p;
  Fields fields(given);
  fill(p, fields);
  fields.finish();
  const Layout l = layout(p, math_of(math), backward);
  return py::make_tuple(l.bytes, l.operand_bytes, l.weight_bytes);
}

}  // namespace

PYBIND11_MODULE(FASTLSTM_CUDA_MODULE, m) {
  m.doc() = "Kernels of fastlstm on CUDA.";
  m.attr("build") = FASTLSTM_CUDA_BUILD;
  m.def("recurrence", &call<Recurrence>, py::arg("math"), py::arg("backward"), py::arg("device"),
        py::arg("stream"));
  m.def("step", &call<Pointwise>, py::arg("math"), py::arg("backward"), py::arg("device"),
        py::arg("stream"));
  m.def("memory", &memory, py::arg("math"), py::arg("backward"));
  m.def("properties", [](int device) {
    const DeviceProperties d = properties(device);
    const auto& c = d.clusters;
    return py::make_tuple(d.major, d.minor, d.multiprocessors, d.shared_bytes, d.cooperative,
                          py::make_tuple(c[0], c[1], c[2], c[3]));
  });
}
