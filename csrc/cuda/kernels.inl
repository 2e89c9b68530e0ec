// The one source of every kernel: recurrence forward and backward over all of T, and the pointwise
// step alone. Included after device.h (nvcc) or emulate.h (host), which give it its vocabulary.
//
// README.md beside this file says why each exchange is ordered.
#pragma once

#include "recurrence.h"

namespace fastlstm::cuda {
namespace {

template <Math kMath>
struct Types;
template <>
struct Types<Math::bf16> {
  using Storage = Bf16;
  using Sum = float;
};
template <>
struct Types<Math::f16> {
  using Storage = F16;
  using Sum = float;
};
template <>
struct Types<Math::tf32> {
  using Storage = float;
  using Sum = float;
};
template <>
struct Types<Math::f32> {
  using Storage = float;
  using Sum = float;
};
template <>
struct Types<Math::f64> {
  using Storage = double;
  using Sum = double;
};

FASTLSTM_DEVICE int at_most(int value, int most) { return value < most ? value : most; }

template <class Sum>
FASTLSTM_DEVICE Sum sigmoid(Sum z) {
  return Sum(1) / (Sum(1) + exponential(-z));
}

// An element of a tensor that may be absent, then 0.
template <class Sum, class Storage>
FASTLSTM_DEVICE Sum read(const void* tensor, int64_t place) {
  return tensor ? to_sum(static_cast<const Storage*>(tensor)[place]) : Sum(0);
}
template <class Storage, class Sum>
FASTLSTM_DEVICE void write(void* tensor, int64_t place, Sum value) {
  if (tensor) static_cast<Storage*>(tensor)[place] = to_storage<Storage>(value);
}

// z becomes the gates; c_{t-1} becomes c_t; returns h_t.
template <class Sum>
FASTLSTM_DEVICE Sum cell_forward(Sum (&z)[4], Sum& c) {
  z[0] = sigmoid(z[0]);
  z[1] = sigmoid(z[1]);
  z[2] = hyperbolic_tangent(z[2]);
  z[3] = sigmoid(z[3]);
  c = z[1] * c + z[0] * z[2];
  return z[3] * hyperbolic_tangent(c);
}

// The gates become dz; dL/dc_t becomes dL/dc_{t-1}.
template <class Sum>
FASTLSTM_DEVICE void cell_backward(Sum (&z)[4], Sum c, Sum c_before, Sum dh, Sum& dc) {
  const Sum i = z[0], f = z[1], g = z[2], o = z[3], tanh_c = hyperbolic_tangent(c);
  const Sum d = dc + dh * o * (Sum(1) - tanh_c * tanh_c);
  z[0] = d * g * i * (Sum(1) - i);
  z[1] = d * c_before * f * (Sum(1) - f);
  z[2] = d * i * (Sum(1) - g * g);
  z[3] = dh * tanh_c * o * (Sum(1) - o);
  dc = d * f;
}

// One block's part of a recurrence: its weights, its part in the exchange, its product.
template <Math kMath, bool kBackward>
struct Block {
  using Storage = typename Types<kMath>::Storage;
  using Sum = typename Types<kMath>::Sum;

  const Recurrence& p;
  const Layout l;
  const int thread, group, rank, direction;
  const int unit0, units;  // this block's units
  char* const shared;
  int slot = 0;  // of the two operands, the one that was published last
  int tick = 0;  // exchanges begun

  FASTLSTM_DEVICE explicit Block(const Recurrence& p)
      : p(p),
        l(layout(p, kMath, kBackward)),
        thread(thread_index()),
        group(block_index() / p.blocks),
        rank(block_index() % p.blocks),
        direction(group % p.directions),
        unit0(rank * p.units),
        units(p.H - unit0 < p.units ? p.H - unit0 : p.units),
        shared(shared_memory()) {}

  // Element e of this thread: batch row n of the slice and unit u of the block.
  struct Place {
    int n, u;
    bool exists;
  };
  FASTLSTM_DEVICE Place place(int e, int rows) const {
    const int i = thread + e * p.threads;
    const int n = i / p.units, u = i % p.units;
    return {n, u, n < rows && u < units};
  }
  // The two values that a thread keeps for its element e: c and h forward, dc and dh backward.
  FASTLSTM_DEVICE Sum& state(int e, int which) const {
    Sum* first = reinterpret_cast<Sum*>(shared + l.state);
    return first[which * p.rows * p.units + thread + e * p.threads];
  }

  // The row of time t, batch row 0, and how many batch rows take part in that time.
  FASTLSTM_DEVICE int64_t first_row(int t) const {
    return p.offsets ? p.offsets[t] : int64_t(t) * p.N;
  }
  FASTLSTM_DEVICE int active(int t) const {
    return p.offsets ? int(p.offsets[t + 1] - p.offsets[t]) : p.N;
  }

  // Where element (m, k) of the weights lies. On tensor cores: in the order in which a lane's four
  // registers of the A fragment of one mma are read, as one 16-byte load; each register holds the
  // words (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4), where lane = 4 * g + t.
  FASTLSTM_DEVICE Storage& weight(int m, int k) const {
    Storage* const first = reinterpret_cast<Storage*>(shared);
    if constexpr (on_tensor_cores(kMath)) {
      constexpr int kPerWord = 4 / int(sizeof(Storage));
      const int word = k / kPerWord, step = word / 8;
      const int lane = m % 8 * 4 + word % 4, reg = m % 16 / 8 + word % 8 / 4 * 2;
      const int fragment = (m / 16 * l.k_steps + step) * kWarp + lane;
      return first[(fragment * 4 + reg) * kPerWord + k % kPerWord];
    } else {
      return first[m * l.stride + k];
    }
  }

  // Copies this block's part of W_hh into shared memory, padded with zeros, and clears the operands.
  FASTLSTM_DEVICE void begin() {
    const Storage* const w = static_cast<const Storage*>(p.weight[direction]);
    const int K = kBackward ? 4 * p.H : p.H;
    const int k_padded = l.k_steps * 32 / int(sizeof(Storage));
    for (int i = thread; i < l.m_rows * k_padded; i += p.threads) {
      // Neighbouring threads read neighbouring elements of W_hh.
      const int m = kBackward ? i % l.m_rows : i / k_padded;
      const int k = kBackward ? i / l.m_rows : i % k_padded;
      const int gate = kBackward ? 0 : m / p.units, u = kBackward ? m : m % p.units;
      const bool exists = k < K && u < units && gate < 4;
      const int64_t from = kBackward ? int64_t(k) * p.H + unit0 + u
                                     : (int64_t(gate) * p.H + unit0 + u) * p.H + k;
      weight(m, k) = exists ? for_product<kMath>(w[from]) : Storage{};
    }
    for (int i = l.operand / 16 + thread; i < l.partial / 16; i += p.threads)
      reinterpret_cast<Vec16*>(shared)[i] = Vec16{};
    // In a cluster also: no block publishes into another's operand before that is cleared.
    if (p.local && p.blocks > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      sync_block();
    }
  }

  FASTLSTM_DEVICE Storage* operand(int which) const {
    return reinterpret_cast<Storage*>(shared + l.operand + which * l.operand_bytes);
  }
  FASTLSTM_DEVICE Storage* exchanged(int which) const {
    return static_cast<Storage*>(p.exchange) +
           (int64_t(group) * 2 + which) * l.r_rows * l.stride;
  }

  // Writes element k of row n of the next operand, for all blocks of the group.
  FASTLSTM_DEVICE void publish(int n, int k, Sum value) {
    const Storage stored = for_product<kMath>(to_storage<Storage>(value));
    const int place = n * l.stride + k;
    if (!p.local) {
      exchanged(slot ^ 1)[place] = stored;
    } else if (p.blocks == 1) {
      operand(slot ^ 1)[place] = stored;
    } else {
      for (int i = 0; i < p.blocks; ++i)
        *of_peer(operand(slot ^ 1) + place, (rank + i) % p.blocks) = stored;
    }
  }
  // After all publishing of a step; what stands between arrive and wait does not delay the others.
  FASTLSTM_DEVICE void arrive() {
    ++tick;
    if (p.local) {
      if (p.blocks > 1) cluster_arrive();
    } else {
      sync_block();
      if (thread == 0) store_release(p.flags + group * flag_stride(p.blocks) + rank, tick);
    }
  }
  // Returns when every block of the group has arrived: the next operand is complete, and the one
  // before it is free to be written.
  FASTLSTM_DEVICE void wait() {
    if (p.local && p.blocks > 1) {
      cluster_wait();
    } else {
      if (!p.local)
        for (int i = thread; i < p.blocks; i += p.threads)
          wait_acquire(p.flags + group * flag_stride(p.blocks) + i, tick);
      sync_block();
    }
    slot ^= 1;
  }

  // out = weights * operand^T, as partial sums in shared memory. All threads see them on return.
  FASTLSTM_DEVICE void product() {
    const Storage* from = operand(slot);
    if (!p.local) {
      const Vec16* source = reinterpret_cast<const Vec16*>(exchanged(slot));
      Vec16* target = reinterpret_cast<Vec16*>(operand(0));
      FASTLSTM_UNROLL
      for (int i = thread; i < l.operand_bytes / 16; i += p.threads)
        target[i] = load_from_l2(source + i);
      sync_block();
      from = operand(0);
    }
    const int lane = thread % kWarp, g = lane / 4, q = lane % 4;
    for (int job = thread / kWarp; job < l.m_tiles * l.splits; job += p.threads / kWarp) {
      const int m = job % l.m_tiles, split = job / l.m_tiles;
      const int k0 = l.k_steps * split / l.splits, k1 = l.k_steps * (split + 1) / l.splits;
      for (int n0 = 0; n0 < l.n_tiles; n0 += 4) {
        Sum sums[4][4] = {};
        for (int k = k0; k < k1; ++k) multiply(sums, from, m, n0, k, g, q);
        FASTLSTM_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (n0 + j >= l.n_tiles) break;
          Sum* out = partial(split, (n0 + j) * 8 + 2 * q, m * 16 + g);
          out[0] = sums[j][0];
          out[l.m_padded] = sums[j][1];
          out[8] = sums[j][2];
          out[l.m_padded + 8] = sums[j][3];
        }
      }
    }
    sync_block();
  }
  FASTLSTM_DEVICE Sum* partial(int split, int n, int m) const {
    return reinterpret_cast<Sum*>(shared + l.partial) + (split * l.r_padded + n) * l.m_padded + m;
  }
  FASTLSTM_DEVICE Sum product_at(int n, int m) const {
    Sum sum = 0;
    for (int split = 0; split < l.splits; ++split) sum += *partial(split, n, m);
    return sum;
  }

  // Adds k-step k of the tile of rows m and the four tiles of columns from n0 on. A lane has the
  // outputs (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1) of each tile, as mma has it.
  FASTLSTM_DEVICE void multiply(Sum (&sums)[4][4], const Storage* from, int m, int n0, int k, int g,
                                int q) const {
    if constexpr (on_tensor_cores(kMath)) {
      const Vec16 a = reinterpret_cast<const Vec16*>(
          shared)[(m * l.k_steps + k) * kWarp + thread % kWarp];
      const int words = l.stride * int(sizeof(Storage)) / 4;
      const uint32_t* b = reinterpret_cast<const uint32_t*>(from) + (n0 * 8 + g) * words + k * 8 + q;
      FASTLSTM_UNROLL
      for (int j = 0; j < 4; ++j)
        if (n0 + j < l.n_tiles) mma<kMath>(sums[j], a, b[j * 8 * words], b[j * 8 * words + 4]);
    } else {
      constexpr int kPer16 = 16 / int(sizeof(Storage));
      // Rows beyond the last are the last once more; nobody reads their sums.
      const Storage* const w = reinterpret_cast<const Storage*>(shared);
      const int m0 = at_most(m * 16 + g, l.m_rows - 1), m1 = at_most(m * 16 + g + 8, l.m_rows - 1);
      FASTLSTM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = (2 * k + half) * kPer16;
        Storage a0[kPer16], a1[kPer16], b0[kPer16], b1[kPer16];
        load16(a0, w + m0 * l.stride + at);
        load16(a1, w + m1 * l.stride + at);
        FASTLSTM_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int n = (n0 + j) * 8 + 2 * q;
          if (n0 + j >= l.n_tiles) break;
          load16(b0, from + at_most(n, l.r_rows - 1) * l.stride + at);
          load16(b1, from + at_most(n + 1, l.r_rows - 1) * l.stride + at);
          FASTLSTM_UNROLL
          for (int i = 0; i < kPer16; ++i) {
            sums[j][0] = fused(a0[i], b0[i], sums[j][0]);
            sums[j][1] = fused(a0[i], b1[i], sums[j][1]);
            sums[j][2] = fused(a1[i], b0[i], sums[j][2]);
            sums[j][3] = fused(a1[i], b1[i], sums[j][3]);
          }
        }
      }
    }
  }
};

template <Math kMath>
FASTLSTM_DEVICE void recurrence_forward(const Recurrence& p) {
  using B = Block<kMath, false>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  B b(p);
  b.begin();

  const int H = p.H, d = b.direction;
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = p.N - n0 < p.rows ? p.N - n0 : p.rows;
    Sum z[kElements][4];  // of the next step, loaded early: the input's part of the gates
    const auto load = [&](int s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = d * p.total + b.first_row(t) + n0;
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists || at.n >= active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          z[e][k] = read<Sum, Storage>(p.gx, (row + at.n) * 4 * H + k * H + b.unit0 + at.u);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      b.state(e, 0) = read<Sum, Storage>(p.c0, place);
      b.state(e, 1) = read<Sum, Storage>(p.h0, place);
      b.publish(at.n, b.unit0 + at.u, b.state(e, 1));
    }
    b.arrive();
    load(0);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = b.first_row(t) + n0;
      b.product();
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists) continue;
        if (at.n < active) {
          FASTLSTM_UNROLL
          for (int k = 0; k < 4; ++k) z[e][k] += b.product_at(at.n, k * p.units + at.u);
          b.state(e, 1) = cell_forward(z[e], b.state(e, 0));
        }
        b.publish(at.n, b.unit0 + at.u, b.state(e, 1));
      }
      b.arrive();
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists || at.n >= active) continue;
        const int unit = b.unit0 + at.u;
        const int64_t kept = d * p.total + row + at.n;
        write<Storage>(p.y, ((row + at.n) * p.directions + d) * H + unit, b.state(e, 1));
        write<Storage>(p.cells, kept * H + unit, b.state(e, 0));
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) write<Storage>(p.gates, kept * 4 * H + k * H + unit, z[e][k]);
      }
      if (s + 1 < p.T) load(s + 1);
      b.wait();
    }

    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      write<Storage>(p.c_n, place, b.state(e, 0));
      write<Storage>(p.h_n, place, b.state(e, 1));
    }
  }
}

// A row that does not take part in a time publishes dz = 0 and keeps what reaches its h: before its
// last step that is grad_h, after its first step dh0. So ragged batches need nothing else.
template <Math kMath>
FASTLSTM_DEVICE void recurrence_backward(const Recurrence& p) {
  using B = Block<kMath, true>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  B b(p);
  b.begin();

  const int H = p.H, d = b.direction;
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = p.N - n0 < p.rows ? p.N - n0 : p.rows;
    Sum z[kElements][4], c[kElements], c_before[kElements], grad[kElements];
    const auto load = [&](int s) {
      const int t = d ? s : p.T - 1 - s, active = b.active(t) - n0;
      const int before = d ? t + 1 : t - 1;  // the time whose state step t started from
      const bool inside = before >= 0 && before < p.T;
      const int active_before = inside ? b.active(before) - n0 : 0;
      const int64_t row = b.first_row(t) + n0;
      const int64_t row_before = inside ? b.first_row(before) + n0 : 0;
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists || at.n >= active) continue;
        const int unit = b.unit0 + at.u;
        const int64_t kept = d * p.total + row + at.n;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          z[e][k] = read<Sum, Storage>(p.gates, kept * 4 * H + k * H + unit);
        c[e] = read<Sum, Storage>(p.cells, kept * H + unit);
        c_before[e] =
            at.n < active_before
                ? read<Sum, Storage>(p.cells, (d * p.total + row_before + at.n) * H + unit)
                : read<Sum, Storage>(p.c0, (int64_t(d) * p.N + n0 + at.n) * H + unit);
        grad[e] = read<Sum, Storage>(p.grad_y, ((row + at.n) * p.directions + d) * H + unit);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      b.state(e, 0) = read<Sum, Storage>(p.grad_c, place);
      b.state(e, 1) = read<Sum, Storage>(p.grad_h, place);
      FASTLSTM_UNROLL
      for (int k = 0; k < 4; ++k) b.publish(at.n, k * H + b.unit0 + at.u, Sum(0));
    }
    b.arrive();
    load(0);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      const int t = d ? s : p.T - 1 - s, active = b.active(t) - n0;
      const int64_t row = d * p.total + b.first_row(t) + n0;
      b.product();
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists) continue;
        const Sum dh = b.state(e, 1) + b.product_at(at.n, at.u);
        const bool takes_part = at.n < active;
        if (takes_part) cell_backward(z[e], c[e], c_before[e], dh + grad[e], b.state(e, 0));
        b.state(e, 1) = takes_part ? Sum(0) : dh;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          b.publish(at.n, k * H + b.unit0 + at.u, takes_part ? z[e][k] : Sum(0));
      }
      b.arrive();
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists || at.n >= active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          write<Storage>(p.dz, (row + at.n) * 4 * H + k * H + b.unit0 + at.u, z[e][k]);
      }
      if (s + 1 < p.T) load(s + 1);
      b.wait();
    }

    b.product();
    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      write<Storage>(p.dc0, place, b.state(e, 0));
      write<Storage>(p.dh0, place, b.state(e, 1) + b.product_at(at.n, at.u));
    }
    // Between this product's reads of the partial sums and the next slice's writes stands the
    // barrier after that slice's first publishing, which goes to the operand nobody reads.
  }
}

template <Math kMath>
FASTLSTM_DEVICE void step_forward(const Pointwise& p) {
  using Storage = typename Types<kMath>::Storage;
  using Sum = typename Types<kMath>::Sum;
  const int64_t i = int64_t(block_index()) * thread_count() + thread_index();
  if (i >= int64_t(p.n) * p.H) return;
  const int64_t n = i / p.H, u = i % p.H;
  Sum z[4];
  for (int k = 0; k < 4; ++k) z[k] = read<Sum, Storage>(p.z, n * 4 * p.H + k * p.H + u);
  Sum& c = static_cast<Sum*>(p.c)[i];
  const Sum h = cell_forward(z, c);
  write<Storage>(p.h, i, h);
  write<Storage>(p.y, n * p.y_stride + u, h);
  write<Storage>(p.cells, i, c);
  for (int k = 0; k < 4; ++k) write<Storage>(p.gates, n * 4 * p.H + k * p.H + u, z[k]);
}

template <Math kMath>
FASTLSTM_DEVICE void step_backward(const Pointwise& p) {
  using Storage = typename Types<kMath>::Storage;
  using Sum = typename Types<kMath>::Sum;
  const int64_t i = int64_t(block_index()) * thread_count() + thread_index();
  if (i >= int64_t(p.n) * p.H) return;
  const int64_t n = i / p.H, u = i % p.H;
  Sum z[4];
  for (int k = 0; k < 4; ++k) z[k] = read<Sum, Storage>(p.gates, n * 4 * p.H + k * p.H + u);
  const Sum c_before = read<Sum, Storage>(n < p.before ? p.cells_before : p.c0, i);
  const Sum dh = read<Sum, Storage>(p.dh, i) + read<Sum, Storage>(p.grad_y, n * p.y_stride + u);
  cell_backward(z, read<Sum, Storage>(p.cells, i), c_before, dh, static_cast<Sum*>(p.c)[i]);
  for (int k = 0; k < 4; ++k) write<Storage>(p.dz, n * 4 * p.H + k * p.H + u, z[k]);
}

}  // namespace
}  // namespace fastlstm::cuda
