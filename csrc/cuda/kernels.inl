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

constexpr int kBatch = 8;  // loads under way at once, in copies

FASTLSTM_DEVICE int at_most(int value, int most) { return value < most ? value : most; }

template <class Sum>
FASTLSTM_DEVICE Sum sigmoid(Sum z) {
  return Sum(1) / (Sum(1) + exponential(-z));
}

// An element of a tensor that may be absent, then 0.
template <class Storage>
FASTLSTM_DEVICE Storage read(const void* tensor, int64_t place) {
  return tensor ? static_cast<const Storage*>(tensor)[place] : Storage{};
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

  static constexpr int kPerWord = sizeof(Storage) < 4 ? 4 / int(sizeof(Storage)) : 1;

  const Recurrence& p;
  const Layout l;
  const int thread, group, rank, direction;
  const int unit0, units;  // this block's units
  char* const shared;
  int slot = 0;  // of the two operands, the one that was published last
  int tick = 0;  // exchanges begun
  Vec16 held[on_tensor_cores(kMath) ? kHeld : 1];

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

  FASTLSTM_DEVICE char* scratch() const {
    return static_cast<char*>(p.scratch) + int64_t(block_index()) * l.weight_bytes;
  }
  // 16 bytes of the weights.
  FASTLSTM_DEVICE Vec16 weight16(int place) const {
    return p.scratch ? load_from_l2(reinterpret_cast<const Vec16*>(scratch()) + place)
                     : reinterpret_cast<const Vec16*>(shared)[place];
  }
  // Element (m, k) of the weights, in W_hh; 0 where they are padded.
  FASTLSTM_DEVICE Storage element(int m, int k) const {
    const int gate = kBackward ? 0 : m / p.units, u = kBackward ? m : m % p.units;
    const int64_t from =
        kBackward ? int64_t(k) * p.H + unit0 + u : (int64_t(gate) * p.H + unit0 + u) * p.H + k;
    const bool exists = k < (kBackward ? 4 * p.H : p.H) && u < units && gate < 4;
    return exists ? static_cast<const Storage*>(p.weight[direction])[from] : Storage{};
  }
  // The k-steps of the first chunk begin here for a split.
  FASTLSTM_DEVICE int first_step(int split) const { return l.chunk_steps * split / l.splits; }
  // Writes element (m, k) of the weights where `product` reads it, if no register holds it. On
  // tensor cores in the order in which a lane's four registers of the A fragment of one mma are
  // read, as one 16-byte load; each register holds the words (row g, word t), (g + 8, t),
  // (g, t + 4), (g + 8, t + 4), where lane = 4 * g + t.
  FASTLSTM_DEVICE void keep(int m, int k, Storage value) const {
    Storage* const first = reinterpret_cast<Storage*>(p.scratch ? scratch() : shared);
    if constexpr (on_tensor_cores(kMath)) {
      const int word = k / kPerWord, step = word / 8;
      int before = l.held * l.splits;  // k-steps in registers
      if (step < l.chunk_steps) {
        const int split = ((step + 1) * l.splits - 1) / l.chunk_steps;
        if (step - first_step(split) < l.held) return;
        before = l.held * (split + 1);
      }
      const int lane = m % 8 * 4 + word % 4, reg = m % 16 / 8 + word % 8 / 4 * 2;
      const int fragment = (m / 16 * l.kept_steps + step - before) * kWarp + lane;
      first[(fragment * 4 + reg) * kPerWord + k % kPerWord] = value;
    } else {
      first[m * l.weight_stride + k] = value;
    }
  }
  // Fills the registers: the same order, straight from W_hh.
  FASTLSTM_DEVICE void hold() {
    const int job = thread / kWarp, lane = thread % kWarp;
    const int m = job % l.m_tiles, step = first_step(job / l.m_tiles);
    FASTLSTM_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (i >= l.held || job >= l.m_tiles * l.splits) continue;
      FASTLSTM_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const int row = m * 16 + lane / 4 + reg % 2 * 8;
        const int k = ((step + i) * 8 + lane % 4 + reg / 2 * 4) * kPerWord;
        Storage parts[kPerWord];
        FASTLSTM_UNROLL
        for (int j = 0; j < kPerWord; ++j) parts[j] = for_product<kMath>(element(row, k + j));
        held[i].words[reg] = word_of(parts);
      }
    }
  }

  // Copies this block's part of W_hh into registers and shared memory, padded with zeros, and
  // clears the operands.
  FASTLSTM_DEVICE void begin() {
    const int k_padded = l.k_steps * 32 / int(sizeof(Storage));
    if constexpr (on_tensor_cores(kMath)) hold();
    for (int first = thread; first < l.m_rows * k_padded; first += kBatch * p.threads) {
      Storage values[kBatch];
      const auto each = [&](auto&& f) {
        FASTLSTM_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          const int i = first + j * p.threads;
          // Neighbouring threads read neighbouring elements of W_hh.
          if (i < l.m_rows * k_padded)
            f(values[j], kBackward ? i % l.m_rows : i / k_padded,
              kBackward ? i / l.m_rows : i % k_padded);
        }
      };
      each([&](Storage& value, int m, int k) { value = element(m, k); });
      each([&](Storage& value, int m, int k) { keep(m, k, for_product<kMath>(value)); });
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
           (int64_t(group) * 2 + which) * (l.operand_bytes / int(sizeof(Storage)));
  }

  // Writes element k of row n of the next operand, for all blocks of the group.
  FASTLSTM_DEVICE void publish(int n, int k, Sum value) {
    const Storage stored = for_product<kMath>(to_storage<Storage>(value));
    const int place = n * l.stride + k;
    if (!p.local) {
      const int k_chunk = l.chunk_steps * 32 / int(sizeof(Storage)), chunk = k / k_chunk;
      exchanged(slot ^ 1)[(chunk * l.r_rows + n) * l.stride + k - chunk * k_chunk] = stored;
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
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      if (!p.local) fetch(chunk);
      const Storage* const from = operand(p.local ? slot : 0);
      for (int job = thread / kWarp; job < l.m_tiles * l.splits; job += p.threads / kWarp) {
        const int m = job % l.m_tiles, split = job / l.m_tiles;
        for (int n = 0; n < l.n_tiles;) {
          if (l.n_tiles - n >= 4) {
            tiles<4>(from, chunk, m, n, split);
            n += 4;
          } else if (l.n_tiles - n >= 2) {
            tiles<2>(from, chunk, m, n, split);
            n += 2;
          } else {
            tiles<1>(from, chunk, m, n, split);
            n += 1;
          }
        }
      }
      sync_block();
    }
  }
  // Copies a part of the operand into shared memory, many loads under way at once.
  FASTLSTM_DEVICE void fetch(int chunk) {
    const int count = l.chunk_bytes / int(sizeof(Vec16));
    const Vec16* const from = reinterpret_cast<const Vec16*>(exchanged(slot)) + chunk * count;
    Vec16* const to = reinterpret_cast<Vec16*>(operand(0));
    for (int i = thread; i < count; i += kBatch * p.threads) {
      Vec16 values[kBatch];
      FASTLSTM_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (i + j * p.threads < count) values[j] = load_from_l2(from + i + j * p.threads);
      FASTLSTM_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (i + j * p.threads < count) to[i + j * p.threads] = values[j];
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

  // One warp: the tile of rows m by the kTiles tiles of columns from n on, over the k-steps of a
  // split. Tensor cores take long for one mma, so four are under way at once: where there are fewer
  // tiles, several chains over k.
  // A lane has the outputs (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1) of each tile, where
  // its index is 4 * g + q, as mma has it. It adds to its own partial sums of the chunks before.
  template <int kTiles>
  FASTLSTM_DEVICE void tiles(const Storage* from, int chunk, int m, int n, int split) const {
    constexpr int kChains = on_tensor_cores(kMath) ? 4 / kTiles : 1;
    Sum sums[kChains][kTiles][4] = {};
    const int before = chunk * l.chunk_steps;
    const int steps = at_most(l.chunk_steps, l.k_steps - before);
    const int end = steps * (split + 1) / l.splits;
    int k = steps * split / l.splits;
    if constexpr (on_tensor_cores(kMath)) {
      if (chunk == 0) {
        FASTLSTM_UNROLL
        for (int i = 0; i < kHeld; ++i)
          if (i < l.held) add(sums[i % kChains], held[i], from, n, k + i);
        k += l.held;
      }
    }
    const int kept = before - l.held * (chunk ? l.splits : split + 1);
    for (; k + kChains <= end; k += kChains) {
      FASTLSTM_UNROLL
      for (int chain = 0; chain < kChains; ++chain)
        multiply(sums[chain], from, m, n, kept, k + chain);
    }
    if constexpr (kChains > 1)
      for (; k < end; ++k) multiply(sums[0], from, m, n, kept, k);

    const int g = thread % kWarp / 4, q = thread % 4;
    FASTLSTM_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      FASTLSTM_UNROLL
      for (int e = 0; e < 4; ++e) {
        Sum sum = sums[0][j][e];
        FASTLSTM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum += sums[chain][j][e];
        Sum& out = *partial(split, (n + j) * 8 + 2 * q + e % 2, m * 16 + g + e / 2 * 8);
        out = chunk ? out + sum : sum;
      }
    }
  }

  // Adds k-step k of a chunk with these weights.
  template <int kTiles>
  FASTLSTM_DEVICE void add(Sum (&sums)[kTiles][4], const Vec16& a, const Storage* from, int n,
                           int k) const {
    const int g = thread % kWarp / 4, q = thread % 4;
    const int words = l.stride * int(sizeof(Storage)) / 4;
    const uint32_t* b = reinterpret_cast<const uint32_t*>(from) + (n * 8 + g) * words + k * 8 + q;
    FASTLSTM_UNROLL
    for (int j = 0; j < kTiles; ++j) mma<kMath>(sums[j], a, b[j * 8 * words], b[j * 8 * words + 4]);
  }
  // Adds k-step k of a chunk, whose weights are those of k-step before + k in memory.
  template <int kTiles>
  FASTLSTM_DEVICE void multiply(Sum (&sums)[kTiles][4], const Storage* from, int m, int n,
                                int before, int k) const {
    const int lane = thread % kWarp, g = lane / 4, q = lane % 4;
    if constexpr (on_tensor_cores(kMath)) {
      add(sums, weight16((m * l.kept_steps + before + k) * kWarp + lane), from, n, k);
    } else {
      constexpr int kPer16 = 16 / int(sizeof(Storage));
      // Rows beyond the last are the last once more; nobody reads their sums.
      const int row16 = l.weight_stride / kPer16;
      const int m0 = at_most(m * 16 + g, l.m_rows - 1), m1 = at_most(m * 16 + g + 8, l.m_rows - 1);
      FASTLSTM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int at = (2 * k + half) * kPer16, at16 = 2 * (before + k) + half;
        Storage a0[kPer16], a1[kPer16], b0[kPer16], b1[kPer16];
        unpack(a0, weight16(m0 * row16 + at16));
        unpack(a1, weight16(m1 * row16 + at16));
        FASTLSTM_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          const int column = (n + j) * 8 + 2 * q;
          unpack(b0, load16(from + at_most(column, l.r_rows - 1) * l.stride + at));
          unpack(b1, load16(from + at_most(column + 1, l.r_rows - 1) * l.stride + at));
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
    // Of the next step, on its way while the group meets: the input's part of the gates. It is
    // converted only where it is needed, since that would wait for it.
    Storage in[kElements][4];
    const auto load = [&](int s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = d * p.total + b.first_row(t) + n0;
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists || at.n >= active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          in[e][k] = read<Storage>(p.gx, (row + at.n) * 4 * H + k * H + b.unit0 + at.u);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      b.state(e, 0) = to_sum(read<Storage>(p.c0, place));
      b.state(e, 1) = to_sum(read<Storage>(p.h0, place));
      b.publish(at.n, b.unit0 + at.u, b.state(e, 1));
    }
    b.arrive();
    load(0);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = b.first_row(t) + n0;
      b.product();
      Sum z[kElements][4];
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists) continue;
        if (at.n < active) {
          FASTLSTM_UNROLL
          for (int k = 0; k < 4; ++k)
            z[e][k] = to_sum(in[e][k]) + b.product_at(at.n, k * p.units + at.u);
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
    Storage gates[kElements][4], c[kElements], c_before[kElements], grad[kElements];
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
          gates[e][k] = read<Storage>(p.gates, kept * 4 * H + k * H + unit);
        c[e] = read<Storage>(p.cells, kept * H + unit);
        c_before[e] = at.n < active_before
                          ? read<Storage>(p.cells, (d * p.total + row_before + at.n) * H + unit)
                          : read<Storage>(p.c0, (int64_t(d) * p.N + n0 + at.n) * H + unit);
        grad[e] = read<Storage>(p.grad_y, ((row + at.n) * p.directions + d) * H + unit);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const auto at = b.place(e, rows);
      if (!at.exists) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + at.n) * H + b.unit0 + at.u;
      b.state(e, 0) = to_sum(read<Storage>(p.grad_c, place));
      b.state(e, 1) = to_sum(read<Storage>(p.grad_h, place));
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
      Sum z[kElements][4] = {};
      FASTLSTM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const auto at = b.place(e, rows);
        if (!at.exists) continue;
        const Sum dh = b.state(e, 1) + b.product_at(at.n, at.u);
        const bool takes_part = at.n < active;
        if (takes_part) {
          FASTLSTM_UNROLL
          for (int k = 0; k < 4; ++k) z[e][k] = to_sum(gates[e][k]);
          cell_backward(z[e], to_sum(c[e]), to_sum(c_before[e]), dh + to_sum(grad[e]),
                        b.state(e, 0));
        }
        b.state(e, 1) = takes_part ? Sum(0) : dh;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) b.publish(at.n, k * H + b.unit0 + at.u, z[e][k]);
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
  for (int k = 0; k < 4; ++k) z[k] = to_sum(read<Storage>(p.z, n * 4 * p.H + k * p.H + u));
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
  for (int k = 0; k < 4; ++k) z[k] = to_sum(read<Storage>(p.gates, n * 4 * p.H + k * p.H + u));
  const Sum c_before = to_sum(read<Storage>(n < p.before ? p.cells_before : p.c0, i));
  const Sum dh =
      to_sum(read<Storage>(p.dh, i)) + to_sum(read<Storage>(p.grad_y, n * p.y_stride + u));
  cell_backward(z, to_sum(read<Storage>(p.cells, i)), c_before, dh, static_cast<Sum*>(p.c)[i]);
  for (int k = 0; k < 4; ++k) write<Storage>(p.dz, n * 4 * p.H + k * p.H + u, z[k]);
}

}  // namespace
}  // namespace fastlstm::cuda
