// The vocabulary of kernels.inl on the device. emulate.h is the same on the host.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "recurrence.h"

#define FASTLSTM_DEVICE __device__ __forceinline__
#define FASTLSTM_UNROLL _Pragma("unroll")

namespace fastlstm::cuda {
namespace {

FASTLSTM_DEVICE int thread_index() { return int(threadIdx.x); }
FASTLSTM_DEVICE int thread_count() { return int(blockDim.x); }
FASTLSTM_DEVICE int block_index() { return int(blockIdx.x); }

FASTLSTM_DEVICE char* shared_memory() {
  extern __shared__ Vec16 memory[];
  return reinterpret_cast<char*>(memory);
}

FASTLSTM_DEVICE void sync_block() { __syncthreads(); }

// Clusters: from compute capability 9.0 on; the plan asks for none below. Not `.aligned`, since the
// threads of a warp may come from different branches.
FASTLSTM_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FASTLSTM_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The same place in the shared memory of block `rank` of the cluster.
template <class T>
FASTLSTM_DEVICE T* of_peer(T* place, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return reinterpret_cast<T*>(there);
#else
  return place;
#endif
}

FASTLSTM_DEVICE void store_release(int32_t* flag, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
FASTLSTM_DEVICE void wait_acquire(const int32_t* flag, int32_t value) {
  int32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
}
// Past the first-level cache, which does not see what other multiprocessors write.
FASTLSTM_DEVICE Vec16 load_from_l2(const Vec16* place) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(place));
  return {{v.x, v.y, v.z, v.w}};
}

template <class T>
FASTLSTM_DEVICE Vec16 load16(const T* from) {
  return *reinterpret_cast<const Vec16*>(from);
}
FASTLSTM_DEVICE void unpack(float (&to)[4], const Vec16& v) {
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(v.words[i]);
}
FASTLSTM_DEVICE void unpack(double (&to)[2], const Vec16& v) {
  for (int i = 0; i < 2; ++i)
    to[i] = __hiloint2double(int(v.words[2 * i + 1]), int(v.words[2 * i]));
}

FASTLSTM_DEVICE float to_sum(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
FASTLSTM_DEVICE float to_sum(F16 v) { return __half2float(__ushort_as_half(v.bits)); }
FASTLSTM_DEVICE float to_sum(float v) { return v; }
FASTLSTM_DEVICE double to_sum(double v) { return v; }

template <class Storage>
FASTLSTM_DEVICE Storage to_storage(float v) {
  if constexpr (sizeof(Storage) == 4) {
    return v;
  } else {
    Storage stored;
    if constexpr (std::is_same_v<Storage, Bf16>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored.bits) : "f"(v));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(v));
    return stored;
  }
}
template <class Storage>
FASTLSTM_DEVICE Storage to_storage(double v) {
  return v;
}

// What mma reads of a value: with TF32 it is rounded, else it is the value itself.
template <Math kMath, class Storage>
FASTLSTM_DEVICE Storage for_product(Storage v) {
  if constexpr (kMath == Math::tf32) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return __uint_as_float(bits);
  } else {
    return v;
  }
}

// Neighbouring elements as the register of a fragment that holds them.
FASTLSTM_DEVICE uint32_t word_of(const float (&v)[1]) { return __float_as_uint(v[0]); }
template <class Half>
FASTLSTM_DEVICE uint32_t word_of(const Half (&v)[2]) {
  return v[0].bits | uint32_t(v[1].bits) << 16;
}

FASTLSTM_DEVICE float exponential(float v) { return expf(v); }
FASTLSTM_DEVICE double exponential(double v) { return exp(v); }
FASTLSTM_DEVICE float hyperbolic_tangent(float v) { return tanhf(v); }
FASTLSTM_DEVICE double hyperbolic_tangent(double v) { return tanh(v); }
FASTLSTM_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FASTLSTM_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// c (16, 8) += a (16, K) * b (K, 8) by a whole warp, K = 16 in half precision and 8 in TF32. The
// fragments are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "... m16n8k8".
#define FASTLSTM_MMA(shape_and_types)                                                              \
  asm volatile(                                                                                    \
      "mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b0), "r"(b1))
template <Math kMath>
FASTLSTM_DEVICE void mma(float (&c)[4], const Vec16& a, uint32_t b0, uint32_t b1) {
  if constexpr (kMath == Math::bf16)
    FASTLSTM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  else if constexpr (kMath == Math::f16)
    FASTLSTM_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else
    FASTLSTM_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FASTLSTM_MMA

}  // namespace
}  // namespace fastlstm::cuda
