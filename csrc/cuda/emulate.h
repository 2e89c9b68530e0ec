// The vocabulary of kernels.inl on the host, for tests: every CUDA thread is a fiber, all blocks of
// a launch are there at once, barriers are real, and mma works on the fragments of the PTX manual.
//
// A fiber runs until it has to wait, and the order in which fibers are resumed is shuffled, so a
// kernel with a missing barrier gives wrong numbers; shared memory begins as NaN. Under
// ThreadSanitizer (-fsanitize=thread) fibers are threads to it and only the vocabulary's barriers,
// releases and acquires order them, so it reports every exchange that is not ordered.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "recurrence.h"

#define FASTLSTM_DEVICE inline
#define FASTLSTM_UNROLL
#define FASTLSTM_UNROLL_2

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define FASTLSTM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define FASTLSTM_UNSEEN
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace fastlstm::cuda {
namespace {

// Where threads wait for one another; that alone orders no memory.
struct Barrier {
  int size = 0, count = 0, generation = 0;
};

struct Lane {  // what a lane brings to an mma
  uint32_t a[4], b[2];
};

struct BlockState {
  std::unique_ptr<Vec16[]> shared;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  int block = 0, thread = 0;
  int arrived = 0;    // generation of the cluster barrier at this fiber's arrival
  int mma_count = 0;  // which of a warp's two sets of lanes the next mma uses
  bool done = false;
};

struct Launch {
  int threads = 0;
  int cluster = 1;  // blocks of a cluster
  std::vector<BlockState> blocks;
  std::vector<Barrier> clusters, warps;
  std::vector<Lane> lanes;  // (warp, 2, 32)
  std::vector<Fiber> fibers;
  std::vector<Fiber*> order;
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  Fiber* running = nullptr;
  bool progress = false;
  void (*kernel)(const void*) = nullptr;
  const void* params = nullptr;
};
inline Launch* launch = nullptr;

FASTLSTM_UNSEEN inline void switch_to(ucontext_t* from, ucontext_t* to, [[maybe_unused]] void* t) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(t, 1);  // 1: the switch orders nothing
#endif
  swapcontext(from, to);
}
FASTLSTM_UNSEEN inline void give_way() {
  switch_to(&launch->running->context, &launch->scheduler, launch->scheduler_tsan);
}
FASTLSTM_UNSEEN inline int arrive_at(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.count == barrier.size) {
    barrier.count = 0;
    ++barrier.generation;
    launch->progress = true;
  }
  return generation;
}
FASTLSTM_UNSEEN inline void wait_at(Barrier& barrier, int generation) {
  while (barrier.generation == generation) give_way();
}

FASTLSTM_UNSEEN inline int thread_index() { return launch->running->thread; }
FASTLSTM_UNSEEN inline int thread_count() { return launch->threads; }
FASTLSTM_UNSEEN inline int block_index() { return launch->running->block; }
FASTLSTM_UNSEEN inline BlockState& block_of(int index) { return launch->blocks[size_t(index)]; }
FASTLSTM_UNSEEN inline Barrier& cluster_barrier() {
  return launch->clusters[size_t(block_index() / launch->cluster)];
}
FASTLSTM_UNSEEN inline char* shared_memory() {
  return reinterpret_cast<char*>(block_of(block_index()).shared.get());
}
FASTLSTM_UNSEEN inline void sync_block() {
  Barrier& barrier = block_of(block_index()).barrier;
  __tsan_release(&barrier);
  wait_at(barrier, arrive_at(barrier));
  __tsan_acquire(&barrier);
}
FASTLSTM_UNSEEN inline void cluster_arrive() {
  __tsan_release(&cluster_barrier());
  launch->running->arrived = arrive_at(cluster_barrier());
}
FASTLSTM_UNSEEN inline void cluster_wait() {
  wait_at(cluster_barrier(), launch->running->arrived);
  __tsan_acquire(&cluster_barrier());
}
FASTLSTM_UNSEEN inline char* of_peer(void* place, int rank) {
  const int first = block_index() / launch->cluster * launch->cluster;
  char* const there = reinterpret_cast<char*>(block_of(first + rank).shared.get());
  return there + (static_cast<char*>(place) - shared_memory());
}

// The barrier of a block for what its peers store: bytes yet to come, arrivals, phases that ended.
struct Counter {
  int32_t bytes;
  int16_t arrived, phase;
};
FASTLSTM_UNSEEN inline void count(Counter* c, int bytes, int arrived) {
  c->bytes += bytes;
  c->arrived = int16_t(c->arrived + arrived);
  launch->progress = true;
  if (c->arrived != 1 || c->bytes != 0) return;
  c->arrived = 0;
  ++c->phase;
}
FASTLSTM_UNSEEN inline void barrier_begin(uint64_t* barrier) {
  *reinterpret_cast<Counter*>(barrier) = {};
}
FASTLSTM_UNSEEN inline void barrier_expect(uint64_t* barrier, int bytes) {
  __tsan_release(barrier);
  count(reinterpret_cast<Counter*>(barrier), bytes, 1);
}
FASTLSTM_UNSEEN inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while ((reinterpret_cast<Counter*>(barrier)->phase & 1) == int(parity)) give_way();
  __tsan_acquire(barrier);
}
inline void store_to_peer(Vec16* place, const Vec16& v, uint64_t* barrier, int rank) {
  *reinterpret_cast<Vec16*>(of_peer(place, rank)) = v;
  char* const there = of_peer(barrier, rank);
  __tsan_release(there);
  count(reinterpret_cast<Counter*>(there), -int(sizeof(Vec16)), 0);
}

FASTLSTM_UNSEEN inline void note_progress() { launch->progress = true; }
template <class Storage>
inline void store_relaxed(Storage* to, Storage v) {
  __atomic_store(to, &v, __ATOMIC_RELAXED);
  note_progress();
}
template <class Storage>
inline Vec16 load_relaxed(const Vec16* from) {
  give_way();
  Storage parts[16 / sizeof(Storage)];
  for (size_t i = 0; i < 16 / sizeof(Storage); ++i)
    __atomic_load(reinterpret_cast<const Storage*>(from) + i, &parts[i], __ATOMIC_RELAXED);
  Vec16 v;
  std::memcpy(&v, parts, sizeof(v));
  return v;
}

template <class T>
inline Vec16 load16(const T* from) {
  return *reinterpret_cast<const Vec16*>(from);
}
template <class T>
inline void unpack(T (&to)[16 / sizeof(T)], const Vec16& v) {
  std::memcpy(to, &v, sizeof(v));
}

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_sum(Bf16 v) { return bits_as<float>(uint32_t(v.bits) << 16); }
inline float to_sum(F16 v) { return float(bits_as<_Float16>(v.bits)); }
inline float to_sum(float v) { return v; }
inline double to_sum(double v) { return v; }

template <class Storage>
inline Storage to_storage(float v) {
  if constexpr (std::is_same_v<Storage, Bf16>) {
    const uint32_t bits = bits_as<uint32_t>(v);
    if (std::isnan(v)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
  } else if constexpr (std::is_same_v<Storage, F16>) {
    return {bits_as<uint16_t>(_Float16(v))};
  } else {
    return v;
  }
}
template <class Storage>
inline Storage to_storage(double v) {
  return v;
}
template <Math kMath, class Storage>
inline Storage for_product(Storage v) {
  if constexpr (kMath == Math::tf32) {
    // to nearest, ties away from zero, to 10 bits of mantissa
    return std::isfinite(v) ? bits_as<float>((bits_as<uint32_t>(v) + 0x1000) & ~0x1fffu) : v;
  } else {
    return v;
  }
}

template <Math kMath, class Word>
inline Word word_for_product(Word v) {
  if constexpr (kMath == Math::tf32)
    return bits_as<Word>(for_product<kMath>(bits_as<float>(v)));
  else
    return v;
}

template <class Word, class Storage, int N>
inline Word word_of(const Storage (&v)[N]) {
  return bits_as<Word>(v);
}

inline float exponential(float v) { return std::exp(v); }
inline double exponential(double v) { return std::exp(v); }
inline float hyperbolic_tangent(float v) { return std::tanh(v); }
inline double hyperbolic_tangent(double v) { return std::tanh(v); }
inline float quick_exp2(float v) { return std::exp2(v); }
inline float quick_reciprocal(float v) { return 1 / v; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }

// c (16, 8) += A (16, K) * B (K, 8), with A and B put together from the registers of all lanes as
// "Matrix Fragments for mma.m16n8k16" and "... m16n8k8" of the PTX manual say.
template <Math kMath>
FASTLSTM_UNSEEN inline void mma(float (&c)[4], const Vec16& a, uint32_t b0, uint32_t b1) {
  constexpr bool kHalf = kMath != Math::tf32;
  constexpr int K = kHalf ? 16 : 8;
  const int thread = thread_index(), lane = thread % kWarp;
  const int warp = (block_index() * launch->threads + thread) / kWarp;
  Lane* const lanes = &launch->lanes[size_t(warp * 2 + launch->running->mma_count++ % 2) * kWarp];
  for (int i = 0; i < 4; ++i) lanes[lane].a[i] = a.words[i];
  lanes[lane].b[0] = b0;
  lanes[lane].b[1] = b1;
  // The lanes meet, as in mma.sync, but that orders no memory. Two sets of lanes: nobody comes to
  // the mma after next before all have read this one.
  Barrier& barrier = launch->warps[size_t(warp)];
  wait_at(barrier, arrive_at(barrier));

  float A[16][K], B[K][8];
  const auto part = [](uint32_t word, int low_or_high) {
    const uint16_t bits = uint16_t(word >> (16 * low_or_high));
    return kMath == Math::bf16 ? to_sum(Bf16{bits}) : to_sum(F16{bits});
  };
  for (int i = 0; i < kWarp; ++i) {
    const int group = i >> 2, in_group = i % 4;
    if (kHalf) {
      for (int e = 0; e < 8; ++e) {
        const int row = e < 2 || (e >= 4 && e < 6) ? group : group + 8;
        const int column = in_group * 2 + (e & 1) + (e >= 4 ? 8 : 0);
        A[row][column % K] = part(lanes[i].a[e / 2], e % 2);
      }
      for (int e = 0; e < 4; ++e)
        B[(in_group * 2 + (e & 1) + (e >= 2 ? 8 : 0)) % K][group] = part(lanes[i].b[e / 2], e % 2);
    } else {
      for (int e = 0; e < 4; ++e)
        A[e % 2 ? group + 8 : group][in_group + (e >= 2 ? 4 : 0)] = bits_as<float>(lanes[i].a[e]);
      for (int e = 0; e < 2; ++e) B[in_group + (e ? 4 : 0)][group] = bits_as<float>(lanes[i].b[e]);
    }
  }
  for (int e = 0; e < 4; ++e) {
    const int row = e < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (e & 1);
    for (int k = 0; k < K; ++k) c[e] += A[row][k] * B[k][column];
  }
}

// The B fragments of two k-steps: of eight rows `stride` bytes apart, 64 bytes each. A lane gives
// the place of quarter lane / 8 of row lane % 8.
inline void load_b(uint32_t (&b)[4], const char* place, int stride) {
  const int lane = thread_index() % kWarp;
  const char* const first = place - lane % 8 * stride - lane / 8 * 16;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&b[i], first + lane / 4 * stride + i * 16 + lane % 4 * 4, 4);
}

inline void pin(int&) {}
inline void pin(int64_t&) {}
template <class T>
inline void pin(T*&) {}

FASTLSTM_UNSEEN inline void fiber_main() {
  launch->kernel(launch->params);
  __tsan_release(launch);  // a kernel's end is seen by who queued it
  launch->running->done = true;
  launch->progress = true;
  give_way();
}

// Runs a kernel to its end, or throws where nobody can go on.
FASTLSTM_UNSEEN inline void emulate(int blocks, int threads, int cluster, int shared_bytes,
                                    void (*kernel)(const void*), const void* params) {
  constexpr size_t kStack = 1 << 17;
  const char* const seed = std::getenv("FASTLSTM_EMULATE_SEED");
  std::mt19937 random(seed ? unsigned(std::atoi(seed)) : 0u);
  Launch here;
  here.threads = threads;
  here.cluster = cluster;
  here.kernel = kernel;
  here.params = params;
  here.blocks.resize(size_t(blocks));
  here.clusters.resize(size_t(blocks / cluster));
  here.warps.resize(size_t(blocks * threads / kWarp));
  here.lanes.resize(here.warps.size() * 2 * kWarp);
  here.fibers.resize(size_t(blocks * threads));
  for (Barrier& b : here.clusters) b.size = cluster * threads;
  for (Barrier& b : here.warps) b.size = kWarp;
  for (BlockState& b : here.blocks) {
    b.shared.reset(new Vec16[size_t(shared_bytes + 15) / 16]);
    std::memset(static_cast<void*>(b.shared.get()), 0xff, size_t(shared_bytes + 15) / 16 * 16);
    b.barrier.size = threads;
  }
  launch = &here;
#ifdef __SANITIZE_THREAD__
  here.scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (size_t i = 0; i < here.fibers.size(); ++i) {
    Fiber& f = here.fibers[i];
    f.block = int(i) / threads;
    f.thread = int(i) % threads;
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#ifdef __SANITIZE_THREAD__
    f.tsan = __tsan_create_fiber(0);
#endif
    here.order.push_back(&f);
  }
  int idle = 0;  // rounds without progress; who polls may take several for one exchange
  while (!here.order.empty() && idle < 1000) {
    std::shuffle(here.order.begin(), here.order.end(), random);
    here.progress = false;
    for (Fiber* f : here.order) {
      here.running = f;
      switch_to(&here.scheduler, &f->context, f->tsan);
    }
    idle = here.progress ? 0 : idle + 1;
    size_t left = 0;
    for (Fiber* f : here.order)
      if (!f->done) here.order[left++] = f;
    here.order.resize(left);
  }
#ifdef __SANITIZE_THREAD__
  for (Fiber& f : here.fibers) __tsan_destroy_fiber(f.tsan);
#endif
  __tsan_acquire(&here);
  launch = nullptr;
  if (idle) throw std::runtime_error("emulated kernel: every thread waits for another");
}

}  // namespace
}  // namespace fastlstm::cuda
