// What the kernels are asked to do, and how a block lays out its shared memory. No CUDA header.
//
// T time steps, N batch rows, H hidden units, G blocks of a group, U units of a block, R batch rows
// of a slice. Gates stand in the order i f g o. All matrices are row-major.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTLSTM_BOTH __host__ __device__
#else
#define FASTLSTM_BOTH
#endif

namespace fastlstm::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
// A kernel has room in registers for weights or for many elements of the pointwise step, `wide`.
constexpr int kHeld = 24;         // most A fragments that a lane holds, in four registers each
constexpr int kElements = 2;      // most elements of the pointwise step that a thread owns
constexpr int kWideElements = 8;  // the same where it holds no weights
constexpr int kGroup = 8;         // of which so many are used together

// The arithmetic of a kernel: dtype in memory, dtype of sums, and who multiplies.
enum class Math { bf16, f16, tf32, f32, f64 };

// bfloat16 and float16 in memory; device.h and emulate.h convert them.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct alignas(16) Vec16 {
  uint32_t words[4];
};

FASTLSTM_BOTH constexpr int storage_bytes(Math m) {
  return m == Math::f64 ? 8 : m == Math::bf16 || m == Math::f16 ? 2 : 4;
}
FASTLSTM_BOTH constexpr int sum_bytes(Math m) { return m == Math::f64 ? 8 : 4; }
FASTLSTM_BOTH constexpr bool on_tensor_cores(Math m) { return m != Math::f32 && m != Math::f64; }

// A pass over all of T of the one or two directions of a layer, as one launch.
//
// Blocks come in groups of G; block `rank` of a group owns the units rank*U .. of every slice that
// its group computes. Groups of direction d are those with group % directions == d; they take that
// direction's slices of R batch rows in turn. Groups never wait for one another.
struct Recurrence {
  int32_t T = 0, N = 0, H = 0, directions = 1;
  int32_t threads = 0, blocks = 0, units = 0, rows = 0, groups = 0;  // blocks is G, groups in all
  int32_t chunks = 1;  // parts in which the operand comes into shared memory; 1 with `local`
  int32_t local = 0;   // 1: a group is one cluster (or block) and exchanges through shared memory
  int32_t wide = 0;    // 1: many elements for each thread, no weights in registers

  // (T+1,) the first row of each time where the batch is ragged, longest sequence first; or null,
  // then row (t, n) is t*N + n. `total` is the number of rows.
  const int64_t* offsets = nullptr;
  int64_t total = 0;

  const void* weight[2] = {};  // W_hh (4H, H) of each direction
  const void* bias[2] = {};    // forward: (4H,) of each direction, to be added to gx; or null
  // Exchange of a group that is no cluster: (groups, exchanges, operand of layout()), all bits set
  // before the launch. Every exchange has memory of its own: T + 1 for each slice of a group.
  void* exchange = nullptr;
  int32_t exchanges = 0;

  void* gates = nullptr;         // (directions, total, 4H) after their activations
  void* cells = nullptr;         // (directions, total, H); forward: or both null
  const void* c0 = nullptr;      // (directions, N, H), or null for zeros
  const void* h0 = nullptr;      // forward: (directions, N, H), or null for zeros
  const void* gx = nullptr;      // forward: (directions, total, 4H), x W_ih^T and a bias
  void* y = nullptr;             // forward: (total, directions*H)
  void* h_n = nullptr;           // forward: (directions, N, H)
  void* c_n = nullptr;           // forward: (directions, N, H)
  const void* grad_y = nullptr;  // backward: (total, directions*H), or null for zeros
  const void* grad_h = nullptr;  // backward: (directions, N, H), or null for zeros
  const void* grad_c = nullptr;  // backward: (directions, N, H), or null for zeros
  void* dz = nullptr;            // backward: (directions, total, 4H)
  void* dh0 = nullptr;           // backward: (directions, N, H)
  void* dc0 = nullptr;           // backward: (directions, N, H)
};

// The pointwise part of one step of one direction, `n` rows of it, for the per-step path.
struct Pointwise {
  int32_t n = 0, H = 0;
  int32_t before = 0;  // backward: rows that `cells_before` has; the others come from c0
  int64_t y_stride = 0;
  const void* z = nullptr;             // forward: (n, 4H), the gates before their activations
  void* c = nullptr;                   // (n, H) in the dtype of sums: c forward, dL/dc backward
  void* h = nullptr;                   // forward: (n, H)
  void* y = nullptr;                   // forward: (n, H) of row stride y_stride, or null
  void* gates = nullptr;               // (n, 4H); forward: or null
  void* cells = nullptr;               // (n, H); forward: or null
  const void* cells_before = nullptr;  // backward: (before, H), c of the step before
  const void* c0 = nullptr;            // backward: (n, H), or null for zeros
  const void* dh = nullptr;            // backward: (n, H), what reaches h from later steps
  const void* grad_y = nullptr;        // backward: (n, H) of row stride y_stride, or null
  void* dz = nullptr;                  // backward: (n, 4H)
};

FASTLSTM_BOTH constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

FASTLSTM_BOTH constexpr int most_elements(Math m, bool wide) {
  return m == Math::f64 ? 4 : wide || !on_tensor_cores(m) ? kWideElements : kElements;
}
// Elements of the pointwise step that a thread owns: unit thread % U, every (threads / U)-th row.
FASTLSTM_BOTH constexpr int rows_of_a_pass(const Recurrence& p) { return p.threads / p.units; }

// The product of a step is  out (M, R) = weights (M, K) * operand (R, K)^T.
//   forward   M = 4U, row gate*U + u;  K = G*S;   operand h_{t-1};  out z
//   backward  M = U;                   K = 4G*S;  operand dz_{t+1}; out dL/dh_t
// where block b's unit u is k = b*S + u (+ gate*G*S); S, `unit_stride`, is U, in a cluster padded
// to 16 bytes. It is cut into tiles of 16 x 8 outputs and k-steps of 32 bytes (the shape of one
// mma), which go in pairs, and where there are fewer tiles of rows than warps, over K: `splits`
// partial sums that the pointwise step adds up in order. Tensor cores read whole tiles, so there
// weights and operand are padded to them. A group that is no cluster keeps its operands in global
// memory, in `chunks` parts over K of (r_rows, stride) each; one part at a time is in shared
// memory. Where each warp has one tile of one split, each split holds `held` k-steps in registers,
// the first of all k-steps; the other weights, kept_steps of each tile of rows, lie in shared
// memory, and the splits share those of each part.
struct Layout {
  int unit_stride, K;
  int m_tiles, n_tiles, k_steps, splits;
  int chunk_steps;                 // k-steps of a part
  int held, kept_steps;            // k-steps in registers, of each split; and all the others
  int m_padded, r_padded;          // of the partial sums
  int m_rows, r_rows;              // of weights and operand in memory
  int weight_stride, stride;       // elements from a row to the next, of weights and operand
  int partial_stride;              // and of the partial sums
  int chunk_bytes, operand_bytes;  // of a part of an operand and of the whole
  int weight_bytes;
  int operand, partial, barriers, bytes;  // where things begin; the weights come first
};

FASTLSTM_BOTH constexpr Layout layout(const Recurrence& p, Math math, bool backward) {
  const int size = storage_bytes(math), sum = sum_bytes(math), warps = p.threads / kWarp;
  const int M = backward ? p.units : 4 * p.units;
  Layout l{};
  const bool in_cluster = p.local && p.blocks > 1;
  l.unit_stride = in_cluster ? round_up(p.units, 16 / size) : p.units;
  l.K = (backward ? 4 : 1) * (in_cluster ? p.blocks * l.unit_stride : p.H);
  l.m_padded = round_up(M, 16);
  l.r_padded = round_up(p.rows, 8);
  l.m_rows = on_tensor_cores(math) ? l.m_padded : M;
  l.r_rows = on_tensor_cores(math) ? l.r_padded : p.rows;
  l.m_tiles = l.m_padded / 16;
  l.n_tiles = l.r_padded / 8;
  l.k_steps = round_up(l.K * size, 64) / 32;
  l.chunk_steps = round_up((l.k_steps + p.chunks - 1) / p.chunks, 2);
  const int pairs = l.chunk_steps / 2;
  l.splits = warps / l.m_tiles;
  l.splits = l.splits < 1 ? 1 : l.splits > pairs ? pairs : l.splits;
  l.held = on_tensor_cores(math) && !p.wide && l.m_tiles <= warps ? pairs / l.splits * 2 : 0;
  l.held = (l.held < kHeld ? l.held : kHeld) / kGroup * kGroup;
  l.kept_steps = l.k_steps - l.held * l.splits;
  // 16 bytes more than whole pairs: rows begin 4 banks (mod 8) apart, so that the eight rows of a
  // fragment are read without conflict. The partial sums are written so with 4 columns more.
  l.weight_stride = (l.k_steps * 32 + 16) / size;
  l.stride = (l.chunk_steps * 32 + 16) / size;
  l.partial_stride = l.m_padded + 4;
  l.chunk_bytes = l.r_rows * l.stride * size;
  l.operand_bytes = p.chunks * l.chunk_bytes;
  l.weight_bytes = l.m_rows * (on_tensor_cores(math) ? l.kept_steps * 32 : l.weight_stride * size);
  l.operand = l.weight_bytes;
  l.partial = l.operand + (p.local ? 2 * l.operand_bytes : l.chunk_bytes);
  l.barriers = l.partial + l.splits * l.r_padded * l.partial_stride * sum;
  l.bytes = l.barriers + 16;
  return l;
}

// What a kernel of a recurrence gets.
struct Task {
  Recurrence p;
  Layout l;
};

// What a device offers; `cooperative`: whether a grid barrier is possible; `clusters`: how many of
// 2, 4, 8 and 16 blocks that take all shared memory run at the same time; `major`: 0 where the
// kernels were compiled for other devices.
struct DeviceProperties {
  int major, minor, multiprocessors, shared_bytes;
  bool cooperative;
  int clusters[4];
};

// Defined by launch.cu on CUDA and by emulated.cpp on the host. They throw std::runtime_error.
void run(const Recurrence& p, Math math, bool backward, int device, void* stream);
void run(const Pointwise& p, Math math, bool backward, int device, void* stream);
DeviceProperties properties(int device);

}  // namespace fastlstm::cuda
