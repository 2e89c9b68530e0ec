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

template <int kCount>
struct Steps {
  static constexpr int value = kCount;
};

FASTLSTM_DEVICE int at_most(int value, int most) { return value < most ? value : most; }

// The activations. Where products are rounded to 11 bits or fewer, so that an error of some 1e-7 is
// nothing, they take a few instructions.
template <Math kMath, class Sum>
FASTLSTM_DEVICE Sum sigmoid(Sum z) {
  if constexpr (on_tensor_cores(kMath))
    return quick_reciprocal(1 + quick_exp2(-1.44269504f * z));
  else
    return Sum(1) / (Sum(1) + exponential(-z));
}
template <Math kMath, class Sum>
FASTLSTM_DEVICE Sum tanh_of(Sum z) {
  if constexpr (on_tensor_cores(kMath))
    return 1 - 2 * quick_reciprocal(1 + quick_exp2(2 * 1.44269504f * z));
  else
    return hyperbolic_tangent(z);
}

// Quotients by the same divisor of 0 <= k < 2^21, without the cost of a division of integers.
struct Divider {
  int by;
  float inverse;
  FASTLSTM_DEVICE explicit Divider(int by) : by(by), inverse(1 / float(by)) {}
  FASTLSTM_DEVICE int operator()(int k) const { return int((float(k) + 0.5f) * inverse); }
};

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
template <Math kMath, class Sum>
FASTLSTM_DEVICE Sum cell_forward(Sum (&z)[4], Sum& c) {
  z[0] = sigmoid<kMath>(z[0]);
  z[1] = sigmoid<kMath>(z[1]);
  z[2] = tanh_of<kMath>(z[2]);
  z[3] = sigmoid<kMath>(z[3]);
  c = z[1] * c + z[0] * z[2];
  return z[3] * tanh_of<kMath>(c);
}

// The gates become dz; dL/dc_t becomes dL/dc_{t-1}.
template <Math kMath, class Sum>
FASTLSTM_DEVICE void cell_backward(Sum (&z)[4], Sum c, Sum c_before, Sum dh, Sum& dc) {
  const Sum i = z[0], f = z[1], g = z[2], o = z[3], tanh_c = tanh_of<kMath>(c);
  const Sum d = dc + dh * o * (Sum(1) - tanh_c * tanh_c);
  z[0] = d * g * i * (Sum(1) - i);
  z[1] = d * c_before * f * (Sum(1) - f);
  z[2] = d * i * (Sum(1) - g * g);
  z[3] = dh * tanh_c * o * (Sum(1) - o);
  dc = d * f;
}

// One block's part of a recurrence: its weights, its part in the exchange, its product.
template <Math kMath, bool kBackward, bool kWide>
struct Block {
  using Storage = typename Types<kMath>::Storage;
  using Sum = typename Types<kMath>::Sum;

  static constexpr int kPerWord = sizeof(Storage) < 4 ? 4 / int(sizeof(Storage)) : 1;
  static constexpr int kOwned = most_elements(kMath, kWide);
  static constexpr int kRegisters = on_tensor_cores(kMath) && !kWide ? kHeld : 0;
  static constexpr int kMostTiles = kRegisters > 0 ? 2 : 4;  // of columns at once
  static constexpr int kParts = kBackward ? 4 : 1;           // of an operand: gates

  const Recurrence& p;
  const Layout& l;
  const int thread, group, rank, direction;
  const int unit0, units;  // this block's units
  char* const shared;
  int slot = 0;            // of the two operands, the one that was published last
  int tick = 0;            // exchanges begun
  int u, n_first, n_step;  // this thread's unit, the first of its rows, and on to the next
  int m_first, split, k_first, k_end;  // of this warp's part of the product, in a whole chunk
  Vec16 held[kRegisters ? kRegisters : 1];

  FASTLSTM_DEVICE explicit Block(const Task& task)
      : p(task.p),
        l(task.l),
        thread(thread_index()),
        group(block_index() / p.blocks),
        rank(block_index() % p.blocks),
        direction(group % p.directions),
        unit0(rank * p.units),
        units(p.H - unit0 < p.units ? p.H - unit0 : p.units),
        shared(shared_memory()) {
    u = thread % p.units;
    n_first = thread / p.units;
    n_step = rows_of_a_pass(p);
    if (n_first >= n_step || u >= units) n_first = p.N;  // owns nothing
    const int warp = thread / kWarp;
    m_first = warp % l.m_tiles;
    split = warp / l.m_tiles;
    k_first = first_step(split);
    k_end = first_step(split + 1);
    if (split >= l.splits) m_first = l.m_tiles;  // has no part
  }

  // The row of this thread's element e, which exists if that is less than the rows of the slice.
  FASTLSTM_DEVICE int row(int e) const { return n_first + e * n_step; }

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
  // The k-steps of the first chunk begin here for a split.
  FASTLSTM_DEVICE int first_step(int split) const {
    return l.chunk_steps / 2 * split / l.splits * 2;
  }
  // Writes element (m, k) of the weights where `product` reads it, if no register holds it. On
  // tensor cores in the order in which a lane's four registers of the A fragment of one mma are
  // read, as one 16-byte load; each register holds the words (row g, word t), (g + 8, t),
  // (g, t + 4), (g + 8, t + 4), where lane = 4 * g + t.
  FASTLSTM_DEVICE void keep(int m, int k, Storage value) const {
    Storage* const first = reinterpret_cast<Storage*>(p.scratch ? scratch() : shared);
    if constexpr (on_tensor_cores(kMath)) {
      const int word = k / kPerWord, step = word / 8;
      int before = l.held * l.splits;  // k-steps in registers
      if (l.held && step < l.chunk_steps) {
        const int own = ((step / 2 + 1) * l.splits - 1) / (l.chunk_steps / 2);
        if (step - first_step(own) < l.held) return;
        before = l.held * (own + 1);
      }
      const int lane = m % 8 * 4 + word % 4, reg = m % 16 / 8 + word % 8 / 4 * 2;
      const int fragment = (m / 16 * l.kept_steps + step - before) * kWarp + lane;
      first[(fragment * 4 + reg) * kPerWord + k % kPerWord] = value;
    } else {
      first[m * l.weight_stride + k] = value;
    }
  }
  // Element (m, k) of the weights, in W_hh; 0 where they are padded.
  struct Elements {
    const Storage* weight;
    int H, units, own, unit0, unit_stride, K;
    Divider by_units, by_stride, by_part;
    FASTLSTM_DEVICE explicit Elements(const Block& b)
        : weight(static_cast<const Storage*>(b.p.weight[b.direction])),
          H(b.p.H),
          units(b.p.units),
          own(b.units),
          unit0(b.unit0),
          unit_stride(b.l.unit_stride),
          K(b.l.K),
          by_units(units),
          by_stride(unit_stride),
          by_part(K / kParts) {}
    FASTLSTM_DEVICE Storage operator()(int m, int k) const {
      const int part = kBackward ? by_part(k) : by_units(m);
      const int unit = unit0 + (kBackward ? m : m - part * units);
      const int in_part = kBackward ? k - part * by_part.by : k;
      const int block = by_stride(in_part), v = in_part - block * unit_stride;
      const int other = block * units + v;  // of the operand
      const bool exists = k < K && part < 4 && unit < unit0 + own && v < units && other < H;
      const int64_t row = int64_t(part) * H + (kBackward ? other : unit);
      return exists ? weight[row * H + (kBackward ? unit : other)] : Storage{};
    }
  };
  // Fills the registers: the same order, straight from W_hh.
  FASTLSTM_DEVICE void hold(const Elements& element) {
    const int lane = thread % kWarp;
    FASTLSTM_UNROLL
    for (int i = 0; i < kRegisters; ++i) {
      if (i >= l.held || m_first >= l.m_tiles) continue;
      FASTLSTM_UNROLL
      for (int reg = 0; reg < 4; ++reg) {
        const int m = m_first * 16 + lane / 4 + reg % 2 * 8;
        const int k = ((k_first + i) * 8 + lane % 4 + reg / 2 * 4) * kPerWord;
        Storage parts[kPerWord];
        FASTLSTM_UNROLL
        for (int j = 0; j < kPerWord; ++j) parts[j] = for_product<kMath>(element(m, k + j));
        held[i].words[reg] = word_of(parts);
      }
    }
  }

  // Copies this block's part of W_hh into registers and shared memory, padded with zeros, and
  // clears the operands.
  FASTLSTM_DEVICE void begin() {
    const Elements element(*this);
    const int k_padded = l.k_steps * 32 / int(sizeof(Storage));
    const Divider by_m(l.m_rows), by_k(k_padded);
    if constexpr (kRegisters > 0) hold(element);
    for (int first = thread; first < l.m_rows * k_padded; first += kBatch * p.threads) {
      Storage values[kBatch];
      const auto each = [&](auto&& f) {
        FASTLSTM_UNROLL
        for (int j = 0; j < kBatch; ++j) {
          const int i = first + j * p.threads;
          // Neighbouring threads read neighbouring elements of W_hh.
          const int q = kBackward ? by_m(i) : by_k(i);
          if (i < l.m_rows * k_padded)
            f(values[j], kBackward ? i - q * l.m_rows : q, kBackward ? q : i - q * k_padded);
        }
      };
      each([&](Storage& value, int m, int k) { value = element(m, k); });
      each([&](Storage& value, int m, int k) { keep(m, k, for_product<kMath>(value)); });
    }
    for (int i = l.operand / 16 + thread; i < l.partial / 16; i += p.threads)
      reinterpret_cast<Vec16*>(shared)[i] = Vec16{};
    // In a cluster also: no block publishes into another's operand before that is cleared, and its
    // barriers are there.
    if (in_cluster()) {
      if (thread < 2) barrier_begin(barrier(thread));
      cluster_arrive();
      cluster_wait();
    } else {
      sync_block();
    }
  }

  FASTLSTM_DEVICE bool in_cluster() const { return p.local && p.blocks > 1; }
  FASTLSTM_DEVICE uint64_t* barrier(int which) const {
    return reinterpret_cast<uint64_t*>(shared + l.barriers) + which;
  }
  FASTLSTM_DEVICE Storage* operand(int which) const {
    return reinterpret_cast<Storage*>(shared + l.operand + which * l.operand_bytes);
  }
  FASTLSTM_DEVICE Storage* exchanged(int which) const {
    return static_cast<Storage*>(p.exchange) +
           (int64_t(group) * 2 + which) * (l.operand_bytes / int(sizeof(Storage)));
  }

  // Writes a part of row n of the next operand, of this thread's unit, for all blocks of the group;
  // in a cluster arrive() sends it to the others.
  FASTLSTM_DEVICE void publish(int n, int part, Sum value) {
    const Storage stored = for_product<kMath>(to_storage<Storage>(value));
    const int k = (part * p.blocks + rank) * l.unit_stride + u;
    if (p.local) {
      operand(slot ^ 1)[n * l.stride + k] = stored;
    } else {
      const int k_chunk = l.chunk_steps * 32 / int(sizeof(Storage));
      const int chunk = p.chunks == 1 ? 0 : k / k_chunk;
      exchanged(slot ^ 1)[(chunk * l.r_rows + n) * l.stride + k - chunk * k_chunk] = stored;
    }
  }
  // After all publishing of so many rows; what stands between arrive and wait does not delay the
  // others.
  FASTLSTM_DEVICE void arrive(int rows) {
    ++tick;
    if (in_cluster()) {
      sync_block();
      send(rows);
    } else if (!p.local) {
      sync_block();
      if (thread == 0) store_release(p.flags + group * flag_stride(p.blocks) + rank, tick);
    }
  }
  // Stores this block's part of the next operand into the shared memory of its peers. Each thread
  // has one place, or some, and stores it to several peers.
  FASTLSTM_DEVICE void send(int rows) {
    const int of_part = l.unit_stride * int(sizeof(Storage)) / 16, of_row = kParts * of_part;
    const int places = rows * of_row, peers = p.blocks - 1;
    uint64_t* const counter = barrier(slot ^ 1);
    if (thread == 0) barrier_expect(counter, peers * places * 16);
    const int width = at_most(places, p.threads), side = Divider(width)(thread);
    const int sides = Divider(width)(p.threads);
    if (side >= sides) return;
    const Divider by_row(of_row), by_part(of_part);
    for (int place = thread - side * width; place < places; place += width) {
      const int n = by_row(place), in_row = place - n * of_row;
      const int part = by_part(in_row), in_part = in_row - part * of_part;
      const int k16 = (part * p.blocks + rank) * of_part + in_part;
      Vec16* const at = reinterpret_cast<Vec16*>(operand(slot ^ 1)) +
                        n * l.stride / (16 / int(sizeof(Storage))) + k16;
      const Vec16 value = *at;
      for (int i = side; i < peers; i += sides) {
        const int peer = rank + 1 + i;
        store_to_peer(at, value, counter, peer < p.blocks ? peer : peer - p.blocks);
      }
    }
  }
  // Returns when every block of the group has arrived: the next operand is complete, and the one
  // before it is free to be written.
  FASTLSTM_DEVICE void wait() {
    if (in_cluster()) {
      barrier_wait(barrier(slot ^ 1), (tick - 1) / 2 % 2);
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
    if (p.scratch)
      product_from(reinterpret_cast<const Vec16*>(scratch()));
    else
      product_from(reinterpret_cast<const Vec16*>(shared));
  }
  FASTLSTM_DEVICE void product_from(const Vec16* weights) {
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      if (!p.local) fetch(chunk);
      const Storage* const from = operand(p.local ? slot : 0);
      for (int m = m_first; m < l.m_tiles; m += p.threads / kWarp) {
        for (int n = 0; n < l.n_tiles;) {
          if (kMostTiles == 4 && l.n_tiles - n >= 4) {
            tiles<kMostTiles>(weights, from, chunk, m, n);
            n += kMostTiles;
          } else if (l.n_tiles - n >= 2) {
            tiles<2>(weights, from, chunk, m, n);
            n += 2;
          } else {
            tiles<1>(weights, from, chunk, m, n);
            n += 1;
          }
        }
      }
      sync_block();
    }
  }
  // Copies a part of the operand into shared memory.
  FASTLSTM_DEVICE void fetch(int chunk) {
    const int count = l.chunk_bytes / int(sizeof(Vec16));
    const Vec16* const from = reinterpret_cast<const Vec16*>(exchanged(slot)) + chunk * count;
    Vec16* const to = reinterpret_cast<Vec16*>(operand(0));
    for (int i = thread; i < count; i += p.threads) copy_from_l2(to + i, from + i);
    wait_for_copies();
    sync_block();
  }
  FASTLSTM_DEVICE Sum* partial(int split, int n, int m) const {
    return reinterpret_cast<Sum*>(shared + l.partial) +
           (split * l.r_padded + n) * l.partial_stride + m;
  }
  FASTLSTM_DEVICE Sum product_at(int n, int m) const {
    Sum sum = *partial(0, n, m);
    for (int split = 1; split < l.splits; ++split) sum += *partial(split, n, m);
    return sum;
  }

  // One warp: the tile of rows m by the kTiles tiles of columns from n on, over the k-steps of its
  // split. Tensor cores take long for one mma, so four are under way at once: where there are fewer
  // tiles, several chains over k.
  // A lane has the outputs (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1) of each tile, where
  // its index is 4 * g + q, as mma has it. It adds to its own partial sums of the chunks before.
  template <int kTiles>
  FASTLSTM_DEVICE void tiles(const Vec16* weights, const Storage* from, int chunk, int m,
                             int n) const {
    constexpr int kChains = on_tensor_cores(kMath) ? 4 / kTiles : 1;
    Sum sums[kChains][kTiles][4] = {};
    const int before = chunk * l.chunk_steps, lane = thread % kWarp, g = lane / 4, q = lane % 4;
    int k = k_first, end = k_end;
    if (before + l.chunk_steps > l.k_steps) {
      const int pairs = l.k_steps > before ? (l.k_steps - before) / 2 : 0;
      k = pairs * split / l.splits * 2;
      end = pairs * (split + 1) / l.splits * 2;
    }
    if constexpr (on_tensor_cores(kMath)) {
      const char* const rows = reinterpret_cast<const char*>(from + n * 8 * l.stride);
      const int row_bytes = l.stride * int(sizeof(Storage));
      // So many k-steps (2 or kGroup), whose loads all come before the products.
      const auto add = [&](auto steps, const Vec16* a) {
        constexpr int kSteps = decltype(steps)::value;
        uint32_t b[kSteps / 2][kTiles][4];
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps / 2; ++i) {
          FASTLSTM_UNROLL
          for (int j = 0; j < kTiles; ++j)
            load_b(b[i][j], rows + j * 8 * row_bytes + (k + 2 * i) * 32, row_bytes);
        }
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          FASTLSTM_UNROLL
          for (int j = 0; j < kTiles; ++j)
            mma<kMath>(sums[i % kChains][j], a[i], b[i / 2][j][i % 2 * 2],
                       b[i / 2][j][i % 2 * 2 + 1]);
        }
        k += kSteps;
      };
      const Vec16* kept = weights + (m * l.kept_steps + before) * kWarp + lane;
      if constexpr (kRegisters > 0) {
        if (chunk == 0) {
          FASTLSTM_UNROLL
          for (int i = 0; i < kRegisters; i += kGroup)
            if (i < l.held) add(Steps<kGroup>(), held + i);
        }
        kept -= l.held * (chunk ? l.splits : split + 1) * kWarp;
      }
      const auto add_kept = [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        Vec16 a[kSteps];
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps; ++i) a[i] = kept[(k + i) * kWarp];
        add(steps, a);
      };
      while (k + kGroup <= end) add_kept(Steps<kGroup>());
      if (k < end) add_kept(Steps<2>());
    } else {
      for (; k < end; ++k) multiply(sums[0], weights, from, m, n, before, k);
    }

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

  // Without tensor cores: adds k-step k of a chunk, whose weights are those of before + k.
  template <int kTiles>
  FASTLSTM_DEVICE void multiply(Sum (&sums)[kTiles][4], const Vec16* weights, const Storage* from,
                                int m, int n, int before, int k) const {
    constexpr int kPer16 = 16 / int(sizeof(Storage));
    const int lane = thread % kWarp, g = lane / 4, q = lane % 4;
    // Rows beyond the last are the last once more; nobody reads their sums.
    const int row16 = l.weight_stride / kPer16;
    const int m0 = at_most(m * 16 + g, l.m_rows - 1), m1 = at_most(m * 16 + g + 8, l.m_rows - 1);
    FASTLSTM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int at = (2 * k + half) * kPer16, at16 = 2 * (before + k) + half;
      Storage a0[kPer16], a1[kPer16], b0[kPer16], b1[kPer16];
      unpack(a0, weights[m0 * row16 + at16]);
      unpack(a1, weights[m1 * row16 + at16]);
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
};

template <Math kMath, bool kWide>
FASTLSTM_DEVICE void recurrence_forward(const Task& task) {
  const Recurrence& p = task.p;
  using B = Block<kMath, false, kWide>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  constexpr int kOwned = B::kOwned;
  B b(task);
  b.begin();

  const int H = p.H, d = b.direction, unit = b.unit0 + b.u;
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = p.N - n0 < p.rows ? p.N - n0 : p.rows;
    // Of the next step, on its way while the group meets: the input's part of the gates. It is
    // converted only where it is needed, since that would wait for it.
    Storage in[kOwned][4];
    Sum c[kOwned], h[kOwned];
    const auto load = [&](int s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = d * p.total + b.first_row(t) + n0;
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows || n >= active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          in[e][k] = read<Storage>(p.gx, (row + n) * 4 * H + k * H + unit);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + n) * H + unit;
      c[e] = to_sum(read<Storage>(p.c0, place));
      h[e] = to_sum(read<Storage>(p.h0, place));
      b.publish(n, 0, h[e]);
    }
    b.arrive(rows);
    load(0);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      const int t = d ? p.T - 1 - s : s, active = b.active(t) - n0;
      const int64_t row = b.first_row(t) + n0;
      b.product();
      // What leaves is written while the group meets; many elements would take too many registers.
      const auto store = [&](int n, const Sum(&gates)[4], Sum h, Sum c) {
        const int64_t kept = d * p.total + row + n;
        write<Storage>(p.y, ((row + n) * p.directions + d) * H + unit, h);
        write<Storage>(p.cells, kept * H + unit, c);
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) write<Storage>(p.gates, kept * 4 * H + k * H + unit, gates[k]);
      };
      Sum z[kWide ? 1 : kOwned][4];
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows) continue;
        Sum(&own)[4] = z[kWide ? 0 : e];
        if (n < active) {
          FASTLSTM_UNROLL
          for (int k = 0; k < 4; ++k)
            own[k] = to_sum(in[e][k]) + b.product_at(n, k * p.units + b.u);
          h[e] = cell_forward<kMath>(own, c[e]);
          if (kWide) store(n, own, h[e], c[e]);
        }
        b.publish(n, 0, h[e]);
      }
      b.arrive(rows);
      if (!kWide) {
        FASTLSTM_UNROLL
        for (int e = 0; e < kOwned; ++e)
          if (b.row(e) < rows && b.row(e) < active) store(b.row(e), z[kWide ? 0 : e], h[e], c[e]);
      }
      if (s + 1 < p.T) load(s + 1);
      b.wait();
    }

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + n) * H + unit;
      write<Storage>(p.c_n, place, c[e]);
      write<Storage>(p.h_n, place, h[e]);
    }
  }
}

// A row that does not take part in a time publishes dz = 0 and keeps what reaches its h: before its
// last step that is grad_h, after its first step dh0. So ragged batches need nothing else.
template <Math kMath, bool kWide>
FASTLSTM_DEVICE void recurrence_backward(const Task& task) {
  const Recurrence& p = task.p;
  using B = Block<kMath, true, kWide>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  constexpr int kOwned = B::kOwned;
  B b(task);
  b.begin();

  const int H = p.H, d = b.direction, unit = b.unit0 + b.u;
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = p.N - n0 < p.rows ? p.N - n0 : p.rows;
    Storage gates[kOwned][4], c[kOwned], c_before[kOwned], grad[kOwned];
    Sum dc[kOwned], dh[kOwned];
    const auto load = [&](int s) {
      const int t = d ? s : p.T - 1 - s, active = b.active(t) - n0;
      const int before = d ? t + 1 : t - 1;  // the time whose state step t started from
      const bool inside = before >= 0 && before < p.T;
      const int active_before = inside ? b.active(before) - n0 : 0;
      const int64_t row = b.first_row(t) + n0;
      const int64_t row_before = inside ? b.first_row(before) + n0 : 0;
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows || n >= active) continue;
        const int64_t kept = d * p.total + row + n;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k)
          gates[e][k] = read<Storage>(p.gates, kept * 4 * H + k * H + unit);
        c[e] = read<Storage>(p.cells, kept * H + unit);
        c_before[e] = n < active_before
                          ? read<Storage>(p.cells, (d * p.total + row_before + n) * H + unit)
                          : read<Storage>(p.c0, (int64_t(d) * p.N + n0 + n) * H + unit);
        grad[e] = read<Storage>(p.grad_y, ((row + n) * p.directions + d) * H + unit);
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + n) * H + unit;
      dc[e] = to_sum(read<Storage>(p.grad_c, place));
      dh[e] = to_sum(read<Storage>(p.grad_h, place));
      FASTLSTM_UNROLL
      for (int k = 0; k < 4; ++k) b.publish(n, k, Sum(0));
    }
    b.arrive(rows);
    load(0);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      const int t = d ? s : p.T - 1 - s, active = b.active(t) - n0;
      const int64_t row = d * p.total + b.first_row(t) + n0;
      b.product();
      const auto store = [&](int n, const Sum(&own)[4]) {
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) write<Storage>(p.dz, (row + n) * 4 * H + k * H + unit, own[k]);
      };
      Sum z[kWide ? 1 : kOwned][4];
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows) continue;
        Sum(&own)[4] = z[kWide ? 0 : e];
        const Sum reaches = dh[e] + b.product_at(n, b.u);
        const bool takes_part = n < active;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) own[k] = takes_part ? to_sum(gates[e][k]) : Sum(0);
        if (takes_part) {
          cell_backward<kMath>(own, to_sum(c[e]), to_sum(c_before[e]), reaches + to_sum(grad[e]),
                               dc[e]);
          if (kWide) store(n, own);
        }
        dh[e] = takes_part ? Sum(0) : reaches;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) b.publish(n, k, own[k]);
      }
      b.arrive(rows);
      if (!kWide) {
        FASTLSTM_UNROLL
        for (int e = 0; e < kOwned; ++e)
          if (b.row(e) < rows && b.row(e) < active) store(b.row(e), z[kWide ? 0 : e]);
      }
      if (s + 1 < p.T) load(s + 1);
      b.wait();
    }

    b.product();
    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      const int64_t place = (int64_t(d) * p.N + n0 + n) * H + unit;
      write<Storage>(p.dc0, place, dc[e]);
      write<Storage>(p.dh0, place, dh[e] + b.product_at(n, b.u));
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
  const Sum h = cell_forward<kMath>(z, c);
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
  cell_backward<kMath>(z, to_sum(read<Storage>(p.cells, i)), c_before, dh,
                       static_cast<Sum*>(p.c)[i]);
  for (int k = 0; k < 4; ++k) write<Storage>(p.dz, n * 4 * p.H + k * p.H + u, z[k]);
}

}  // namespace
}  // namespace fastlstm::cuda
