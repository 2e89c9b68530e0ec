// Runs the kernels on the host, for tests: the same interface as launch.cu.

#include "emulate.h"
#include "kernels.inl"

namespace fastlstm::cuda {
namespace {

template <Math kMath, bool kWide, bool kGrid>
void run_as(const Recurrence& p, bool backward) {
  const auto kernel = [](const void* q) {
    recurrence_forward<kMath, kWide, kGrid>(*static_cast<const Task*>(q));
  };
  const auto kernel_backward = [](const void* q) {
    recurrence_backward<kMath, kWide, kGrid>(*static_cast<const Task*>(q));
  };
  const Task task{p, layout(p, kMath, backward)};
  emulate(p.groups * p.blocks, p.threads, p.local ? p.blocks : 1, task.l.bytes,
          backward ? +kernel_backward : +kernel, &task);
}
template <Math kMath, bool kWide>
void run_as(const Recurrence& p, bool backward) {
  if (p.local)
    run_as<kMath, kWide, false>(p, backward);
  else
    run_as<kMath, kWide, true>(p, backward);
}
template <Math kMath>
void run_as(const Recurrence& p, bool backward) {
  if (p.wide || !on_tensor_cores(kMath))
    run_as<kMath, true>(p, backward);
  else
    run_as<kMath, false>(p, backward);
}

template <Math kMath>
void run_as(const Pointwise& p, bool backward) {
  const auto kernel = [](const void* q) { step_forward<kMath>(*static_cast<const Pointwise*>(q)); };
  const auto kernel_backward = [](const void* q) {
    step_backward<kMath>(*static_cast<const Pointwise*>(q));
  };
  constexpr int kThreads = 64;
  const int64_t blocks = (int64_t(p.n) * p.H + kThreads - 1) / kThreads;
  emulate(int(blocks), kThreads, 1, 16, backward ? +kernel_backward : +kernel, &p);
}

template <class Params>
void run_math(const Params& p, Math math, bool backward) {
  switch (math) {
    case Math::bf16:
      return run_as<Math::bf16>(p, backward);
    case Math::f16:
      return run_as<Math::f16>(p, backward);
    case Math::tf32:
      return run_as<Math::tf32>(p, backward);
    case Math::f32:
      return run_as<Math::f32>(p, backward);
    case Math::f64:
      return run_as<Math::f64>(p, backward);
  }
}

}  // namespace

void run(const Recurrence& p, Math math, bool backward, int, void*) { run_math(p, math, backward); }
void run(const Pointwise& p, Math math, bool backward, int, void*) { run_math(p, math, backward); }
DeviceProperties properties(int) { return {9, 0, 132, 232448, true, {64, 32, 16, 7}}; }

}  // namespace fastlstm::cuda
