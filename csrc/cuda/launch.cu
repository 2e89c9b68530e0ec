// Launches the kernels on a device. Everything is queued on the caller's stream; nothing waits.
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "device.h"
#include "kernels.inl"

namespace fastlstm::cuda {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it once more
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

template <Math kMath, bool kBackward, bool kWide, bool kGrid>
__global__ void __launch_bounds__(kMaxThreads, 1)
    recurrence_kernel(const __grid_constant__ Task task) {
  if constexpr (kBackward)
    recurrence_backward<kMath, kWide, kGrid>(task);
  else
    recurrence_forward<kMath, kWide, kGrid>(task);
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

template <bool kBackward, bool kWide, bool kGrid>
Kernel<const Task> recurrence_for(Math math) {
  switch (math) {
    case Math::bf16:
      return recurrence_kernel<Math::bf16, kBackward, kWide, kGrid>;
    case Math::f16:
      return recurrence_kernel<Math::f16, kBackward, kWide, kGrid>;
    case Math::tf32:
      return recurrence_kernel<Math::tf32, kBackward, kWide, kGrid>;
    case Math::f32:
      return recurrence_kernel<Math::f32, kBackward, true, kGrid>;
    default:
      return recurrence_kernel<Math::f64, kBackward, true, kGrid>;
  }
}
template <bool kBackward>
Kernel<const Task> recurrence_for(Math math, bool wide, bool grid) {
  if (wide)
    return grid ? recurrence_for<kBackward, true, true>(math)
                : recurrence_for<kBackward, true, false>(math);
  return grid ? recurrence_for<kBackward, false, true>(math)
              : recurrence_for<kBackward, false, false>(math);
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

// What a kernel may ask of the device: all of a block's shared memory, and clusters of 16. Asked of
// the driver once for each kernel and device, as every question takes the host some microseconds.
void allow(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  int bytes = 0, major = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  if (major >= 9)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  allowed.insert({kernel, device});
}

}  // namespace

void run(const Recurrence& p, Math math, bool backward, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto kernel = backward ? recurrence_for<true>(math, p.wide, !p.local)
                               : recurrence_for<false>(math, p.wide, !p.local);
  const Task task{p, layout(p, math, backward)};
  allow(reinterpret_cast<const void*>(kernel), device);

  // A group waits for its own blocks, so these must run at the same time: the blocks of a cluster
  // do; without clusters a cooperative launch promises it of all blocks, or fails.
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.groups * p.blocks));
  config.blockDim = dim3(unsigned(p.threads));
  config.dynamicSmemBytes = size_t(task.l.bytes);
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
  check(cudaLaunchKernelEx(&config, kernel, task), "cudaLaunchKernelEx");
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
  DeviceProperties found{
      get(cudaDevAttrComputeCapabilityMajor), get(cudaDevAttrComputeCapabilityMinor),
      get(cudaDevAttrMultiProcessorCount),    get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      get(cudaDevAttrCooperativeLaunch) != 0, {}};
  const DeviceGuard guard(device);
  const void* const kernel =
      reinterpret_cast<const void*>(recurrence_for<true>(Math::bf16, false, false));
  cudaFuncAttributes compiled{};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    found.major = 0;
    return found;
  }
  check(error, "cudaFuncGetAttributes");
  // What the driver made of code for an older device has no exchange within a cluster.
  if (found.major < 9 || compiled.ptxVersion < 90) return found;
  allow(kernel, device);
  for (int i = 0; i < 4; ++i) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 2u << i;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2u << i);
    config.blockDim = dim3(kMaxThreads);
    config.dynamicSmemBytes = size_t(found.shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    // An error means that there is no such cluster here.
    if (cudaOccupancyMaxActiveClusters(&found.clusters[i], kernel, &config) != cudaSuccess) {
      found.clusters[i] = 0;
      cudaGetLastError();
    }
  }
  return found;
}

}  // namespace fastlstm::cuda
