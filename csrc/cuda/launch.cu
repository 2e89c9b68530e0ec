// Launches the kernels on a device. Everything is queued on the caller's stream; nothing waits.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "kernels.inl"

namespace fastlstm::cuda {
namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Makes a device current and gives the one before back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <Math kMath, bool kBackward>
__global__ void __launch_bounds__(kMaxThreads, 1) recurrence_kernel(const Recurrence p) {
  if constexpr (kBackward)
    recurrence_backward<kMath>(p);
  else
    recurrence_forward<kMath>(p);
}

template <Math kMath, bool kBackward>
__global__ void __launch_bounds__(kMaxThreads) step_kernel(const Pointwise p) {
  if constexpr (kBackward)
    step_backward<kMath>(p);
  else
    step_forward<kMath>(p);
}

template <class Params>
using Kernel = void (*)(Params);

template <bool kBackward>
Kernel<const Recurrence> recurrence_for(Math math) {
  switch (math) {
    case Math::bf16:
      return recurrence_kernel<Math::bf16, kBackward>;
    case Math::f16:
      return recurrence_kernel<Math::f16, kBackward>;
    case Math::tf32:
      return recurrence_kernel<Math::tf32, kBackward>;
    case Math::f32:
      return recurrence_kernel<Math::f32, kBackward>;
    default:
      return recurrence_kernel<Math::f64, kBackward>;
  }
}

template <bool kBackward>
Kernel<const Pointwise> step_for(Math math) {
  switch (math) {
    case Math::bf16:
      return step_kernel<Math::bf16, kBackward>;
    case Math::f16:
      return step_kernel<Math::f16, kBackward>;
    case Math::f64:
      return step_kernel<Math::f64, kBackward>;
    default:
      return step_kernel<Math::f32, kBackward>;
  }
}

}  // namespace

void run(const Recurrence& p, Math math, bool backward, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto kernel = backward ? recurrence_for<true>(math) : recurrence_for<false>(math);
  const int bytes = layout(p, math, backward).bytes;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");

  // A group waits for its own blocks, so these must run at the same time: the blocks of a cluster
  // do; without clusters a cooperative launch promises it of all blocks, or fails.
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.groups * p.blocks));
  config.blockDim = dim3(unsigned(p.threads));
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = p.blocks > 1 ? 1 : 0;
  if (p.local) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(p.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, p), "cudaLaunchKernelEx");
}

void run(const Pointwise& p, Math math, bool backward, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto kernel = backward ? step_for<true>(math) : step_for<false>(math);
  const int64_t blocks = (int64_t(p.n) * p.H + kMaxThreads - 1) / kMaxThreads;
  kernel<<<unsigned(blocks), kMaxThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError(), "step_kernel");
}

DeviceProperties properties(int device) {
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {get(cudaDevAttrComputeCapabilityMajor), get(cudaDevAttrComputeCapabilityMinor),
          get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          get(cudaDevAttrCooperativeLaunch) != 0};
}

}  // namespace fastlstm::cuda
