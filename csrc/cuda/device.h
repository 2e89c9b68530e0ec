// The vocabulary of kernels.inl on the device. emulate.h is the same on the host.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "recurrence.h"

#define FASTLSTM_DEVICE __device__ __forceinline__
#define FASTLSTM_UNROLL _Pragma("unroll")
#define FASTLSTM_UNROLL_2 _Pragma("unroll 2")

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
// A block's barrier for data that others of its cluster store into its shared memory: a phase ends
// when as many bytes have come as were expected, once in each phase.
FASTLSTM_DEVICE uint32_t shared_address(const void* place) {
  return uint32_t(__cvta_generic_to_shared(place));
}
FASTLSTM_DEVICE void barrier_begin([[maybe_unused]] uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
FASTLSTM_DEVICE void barrier_expect([[maybe_unused]] uint64_t* barrier,
                                    [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
FASTLSTM_DEVICE void barrier_wait([[maybe_unused]] uint64_t* barrier,
                                  [[maybe_unused]] uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}
// Stores 16 bytes at the same place in block `rank` of the cluster, and counts them at its barrier.
FASTLSTM_DEVICE void store_to_peer([[maybe_unused]] Vec16* place, [[maybe_unused]] const Vec16& v,
                                   [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there, counter;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counter)
      : "r"(shared_address(barrier)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(there),
      "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3]), "r"(counter)
      : "memory");
#endif
}

// Stores of elements and loads of 16 bytes that meet in the second-level cache. Each element comes
// whole, in no order with others.
template <class Half>
FASTLSTM_DEVICE void store_relaxed(Half* to, Half v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(v.bits) : "memory");
}
FASTLSTM_DEVICE void store_relaxed(float* to, float v) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory");
}
FASTLSTM_DEVICE void store_relaxed(double* to, double v) {
  asm volatile("st.relaxed.gpu.global.f64 [%0], %1;" ::"l"(to), "d"(v) : "memory");
}
template <class Storage>
FASTLSTM_DEVICE Vec16 load_relaxed(const Vec16* from) {
  Vec16 v;
  if constexpr (sizeof(Storage) == 8) {
    uint64_t a, b;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(a), "=l"(b)
                 : "l"(from)
                 : "memory");
    v = {{uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)}};
  } else {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
                 : "l"(from)
                 : "memory");
  }
  return v;
}

template <class T>
FASTLSTM_DEVICE Vec16 load16(const T* from) {
  return *reinterpret_cast<const Vec16*>(from);
}
FASTLSTM_DEVICE void unpack(uint32_t (&to)[4], const Vec16& v) {
  for (int i = 0; i < 4; ++i) to[i] = v.words[i];
}
FASTLSTM_DEVICE void unpack(float (&to)[4], const Vec16& v) {
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(v.words[i]);
}
FASTLSTM_DEVICE void unpack(double (&to)[2], const Vec16& v) {
  for (int i = 0; i < 2; ++i)
    to[i] = __hiloint2double(int(v.words[2 * i + 1]), int(v.words[2 * i]));
}
template <class Half>
FASTLSTM_DEVICE void unpack(Half (&to)[8], const Vec16& v) {
  for (int i = 0; i < 8; ++i) to[i].bits = uint16_t(v.words[i / 2] >> (i % 2 * 16));
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
template <Math kMath, class Word>
FASTLSTM_DEVICE Word word_for_product(Word v) {
  if constexpr (kMath == Math::tf32)
    return __float_as_uint(for_product<kMath>(__uint_as_float(v)));
  else
    return v;
}

// Neighbouring elements as the register of a fragment that holds them; without tensor cores the
// element itself.
template <class Word>
FASTLSTM_DEVICE Word word_as(float v) {
  if constexpr (std::is_same_v<Word, uint32_t>)
    return __float_as_uint(v);
  else
    return v;
}
template <class Word>
FASTLSTM_DEVICE Word word_of(const float (&v)[1]) {
  return word_as<Word>(v[0]);
}
template <class Word>
FASTLSTM_DEVICE Word word_of(const double (&v)[1]) {
  return v[0];
}
template <class Word, class Half>
FASTLSTM_DEVICE Word word_of(const Half (&v)[2]) {
  return v[0].bits | uint32_t(v[1].bits) << 16;
}

FASTLSTM_DEVICE float exponential(float v) { return expf(v); }
FASTLSTM_DEVICE double exponential(double v) { return exp(v); }
FASTLSTM_DEVICE float hyperbolic_tangent(float v) { return tanhf(v); }
FASTLSTM_DEVICE double hyperbolic_tangent(double v) { return tanh(v); }
// 2^v and 1 / v within a few units in the last place; right for infinities and NaN.
FASTLSTM_DEVICE float quick_exp2(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}
FASTLSTM_DEVICE float quick_reciprocal(float v) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}
FASTLSTM_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
FASTLSTM_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// c (16, 8) += a (16, K) * b (K, 8) by a whole warp, K = 16 in half precision and 8 in TF32. The
// fragments are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "... m16n8k8".
#define FASTLSTM_MMA(shape_and_types)                                                              \
  asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
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

// The B fragments of two k-steps, by a whole warp: of eight rows `stride` bytes apart, 64 bytes
// each. A lane gives the place of quarter lane / 8 of row lane % 8.
FASTLSTM_DEVICE void load_b(uint32_t (&b)[4], const char* place, [[maybe_unused]] int stride) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared_address(place))
               : "memory");
}

// Keeps a value in a register, where the compiler would sooner compute it again at each use; and
// what depends on it is not computed before this.
FASTLSTM_DEVICE void pin(int& v) { asm volatile("" : "+r"(v)); }
FASTLSTM_DEVICE void pin(int64_t& v) { asm volatile("" : "+l"(v)); }
template <class T>
FASTLSTM_DEVICE void pin(T*& v) {
  asm volatile("" : "+l"(v));
}

}  // namespace
}  // namespace fastlstm::cuda
