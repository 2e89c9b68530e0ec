// The one source of every kernel: recurrence forward and backward over all of T, and the pointwise
// step alone. Included after device.h (nvcc) or emulate.h (host), which give it its vocabulary.
//
// README.md beside this file says why each exchange is ordered.
#pragma once

#include <cmath>
#include <type_traits>

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

constexpr int kBatch = 8;  // loads under way at once, in copies of weights

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

// Quotients by the same divisor of 0 <= k < 2^20, without the cost of a division of integers.
struct Divider {
  int by;
  float inverse;
  FASTLSTM_DEVICE explicit Divider(int by) : by(by), inverse(quick_reciprocal(float(by))) {}
  FASTLSTM_DEVICE int operator()(int k) const { return int((float(k) + 0.5f) * inverse); }
};

// An element of a tensor that may be absent, then 0.
template <class Storage>
FASTLSTM_DEVICE Storage read(const void* tensor, int64_t place) {
  return tensor ? static_cast<const Storage*>(tensor)[place] : Storage{};
}
// A tensor, which may be absent, from one of its elements on.
template <class Storage>
FASTLSTM_DEVICE const Storage* moved(const void* tensor, int64_t places) {
  return tensor ? static_cast<const Storage*>(tensor) + places : nullptr;
}
template <class Storage>
FASTLSTM_DEVICE Storage* moved(void* tensor, int64_t places) {
  return tensor ? static_cast<Storage*>(tensor) + places : nullptr;
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
//
// What a step needs of places in memory is found once, before the first: a step is short, and every
// instruction in it is waited for.
template <Math kMath, bool kBackward, bool kWide, bool kGrid>
struct Block {
  using Storage = typename Types<kMath>::Storage;
  using Sum = typename Types<kMath>::Sum;
  // The weights come in words, of two elements in half precision.
  using Word = std::conditional_t<on_tensor_cores(kMath), uint32_t, Storage>;

  static constexpr bool kTensorCores = on_tensor_cores(kMath);
  static constexpr int kPerWord = sizeof(Storage) < 4 ? 4 / int(sizeof(Storage)) : 1;
  static constexpr int kPer16 = 16 / int(sizeof(Storage));
  static constexpr int kOwned = most_elements(kMath, kWide);
  static constexpr int kRegisters = kTensorCores && !kWide ? kHeld : 0;
  static constexpr int kMostTiles = kRegisters > 0 ? 2 : 4;  // of columns at once
  static constexpr int kParts = kBackward ? 4 : 1;           // of an operand: gates
  static constexpr int kSums = kBackward ? 1 : 4;            // of the product, for each unit

  // Some k-steps.
  struct Range {
    int first, end;
  };

  const Recurrence& p;
  const Layout& l;
  const int thread, group, rank, direction;
  const int unit0, units;  // this block's units
  char* const shared;
  const Divider by_splits;
  int slot = 0;  // of the two operands, the one that was published last
  int tick = 0;  // exchanges begun
  int slice_rows = 0;
  int u, n_first, n_step;  // this thread's unit, the first of its rows, and on to the next
  int m_first, split;      // of this warp's part of the product
  Range kept;              // and its k-steps whose weights no register holds, in the first chunk
  // Bytes from the start of shared memory: to what a lane reads of an operand's first tile, and
  // from there to the first k-step that is held; to the weights of the first that is not; to its
  // sums; and from the sums of a row to the next.
  int b_at = 0, b_held = 0, a_at = 0, out_at, out_row;
  int splits;
  int in_at, in_step, in_split;  // bytes: where the sums of an element begin; to the next element's
  int published[kParts];         // where this thread's first element stands in an operand
  int publish_step;              // and on to its next element
  // Of a thread that fetches: 16 bytes from each of its places, which follow by so many.
  int fetch_at, fetch_column, fetch_step, fetch_columns;
  char* exchange;   // in global memory, what will be published next
  int padding = 0;  // elements after this thread's, up to a multiple of 16 bytes
  // Of a thread that sends: 16 bytes from each of its places, to every `sides`-th peer.
  int send_places = 0, send_first = 0, send_at = 0, send_width = 1, send_side = 0, send_sides = 1;
  Vec16 held[kRegisters ? kRegisters : 1];

  FASTLSTM_DEVICE explicit Block(const Task& task)
      : p(task.p),
        l(task.l),
        thread(thread_index()),
        group(block_index() / p.blocks),
        rank(block_index() % p.blocks),
        direction(group % p.directions),
        unit0(rank * p.units),
        units(at_most(p.H - unit0, p.units)),
        shared(shared_memory()),
        by_splits(l.splits) {
    u = thread % p.units;
    n_first = thread / p.units;
    n_step = rows_of_a_pass(p);
    const int warp = thread / kWarp;
    m_first = warp % l.m_tiles;
    split = warp / l.m_tiles;
    kept = kept_in(0);
    if (split >= l.splits) m_first = l.m_tiles;  // has no part
    const int lane = thread % kWarp;
    if constexpr (kTensorCores) {
      b_at = l.operand + lane % 8 * l.stride * int(sizeof(Storage)) + lane / 8 * 16;
      b_held = split * l.held * 32;
      a_at = ((m_first * l.kept_steps + kept.first - l.held * l.splits) * kWarp + lane) * 16;
    }
    out_row = l.partial_stride * int(sizeof(Sum));
    out_at = l.partial + (split * l.r_padded + lane % 4 * 2) * out_row +
             (m_first * 16 + lane / 4) * int(sizeof(Sum));
    in_at = l.partial + n_first * out_row + u * kSums * int(sizeof(Sum));
    in_step = n_step * out_row;
    in_split = l.r_padded * out_row;
    splits = l.splits;
    publish_step = n_step * l.stride;
    FASTLSTM_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int k = part * (l.K / kParts) + rank * l.unit_stride + u;
      const int k_chunk = l.chunk_steps * 32 / int(sizeof(Storage)), chunk = k / k_chunk;
      published[part] = (chunk * l.r_rows + n_first) * l.stride + k - chunk * k_chunk;
      pin(published[part]);
    }
    exchange = static_cast<char*>(p.exchange) + int64_t(group) * p.exchanges * l.operand_bytes;
    for (int* value : {&b_at, &b_held, &a_at, &out_at, &out_row, &in_at, &in_step, &in_split,
                       &publish_step, &splits, &kept.first, &kept.end})
      pin(*value);
    if constexpr (kGrid) {
      const int columns = l.chunk_steps * 2, n = thread / columns, more = p.threads / columns;
      fetch_column = thread - n * columns;
      fetch_at = n * (l.stride / kPer16) + fetch_column;
      fetch_columns = p.threads - more * columns;
      fetch_step = more * (l.stride / kPer16) + fetch_columns;
      if (unit0 + u == p.H - 1) padding = round_up(l.K, kPer16) - l.K;
    }
    if (n_first >= n_step || u >= units) n_first = p.N;  // owns nothing
  }

  // The row of this thread's element e, which exists if that is less than the rows of the slice.
  FASTLSTM_DEVICE int row(int e) const { return n_first + e * n_step; }

  // The k-steps of a chunk whose weights lie in shared memory, of this warp's split.
  FASTLSTM_DEVICE Range kept_in(int chunk) const {
    const int before = chunk ? chunk * l.chunk_steps : l.held * l.splits;
    const int end = at_most((chunk + 1) * l.chunk_steps, l.k_steps);
    const int pairs = end > before ? (end - before) / 2 : 0;
    return {before + by_splits(pairs * split) * 2, before + by_splits(pairs * (split + 1)) * 2};
  }

  // The weights as they stand in W_hh; 0 where they are padded.
  struct Elements {
    const Storage* weight;
    int H, units, unit0, end, unit_stride, K;
    Divider by_stride, by_part;
    FASTLSTM_DEVICE explicit Elements(const Block& b)
        : weight(static_cast<const Storage*>(b.p.weight[b.direction])),
          H(b.p.H),
          units(b.p.units),
          unit0(b.unit0),
          end(b.unit0 + b.units),
          unit_stride(b.l.unit_stride),
          K(b.l.K),
          by_stride(unit_stride),
          by_part(K / kParts) {}
    // Element (m, k), or where it would be if it is none.
    struct Place {
      int64_t at;
      bool exists;
    };
    FASTLSTM_DEVICE Place place(int m, int k) const {
      const int part = kBackward ? by_part(k) : m % 4;
      const int unit = unit0 + (kBackward ? m : m / 4);
      const int in_part = kBackward ? k - part * by_part.by : k;
      const int block = by_stride(in_part), v = in_part - block * unit_stride;
      const int other = block * units + v;  // of the operand
      const bool exists = k < K && part < 4 && unit < end && v < units && other < H;
      const int64_t row = int64_t(part) * H + (kBackward ? other : unit);
      return {row * H + (kBackward ? unit : other), exists};
    }
    FASTLSTM_DEVICE Word word(int m, int w) const {
      Storage parts[kPerWord];
      FASTLSTM_UNROLL
      for (int j = 0; j < kPerWord; ++j) {
        const Place found = place(m, w * kPerWord + j);
        parts[j] = found.exists ? weight[found.at] : Storage{};
      }
      return word_of<Word>(parts);
    }
    // Whether 16 bytes of a row of W_hh are 16 bytes of the operand's or the block's units, and
    // stand on a multiple of 16.
    FASTLSTM_DEVICE bool by16() const {
      return H % kPer16 == 0 && unit_stride == units && (!kBackward || units % kPer16 == 0) &&
             reinterpret_cast<uintptr_t>(weight) % 16 == 0;
    }
    FASTLSTM_DEVICE Vec16 vector(int m, int k) const {
      const Place found = place(m, k);
      return found.exists ? load16(weight + found.at) : Vec16{};
    }
  };
  // Calls load(place) and then store(place, loaded) for all places, kBatch loads at a time.
  template <class Loaded, class Load, class Store>
  FASTLSTM_DEVICE void copy(int places, Load&& load, Store&& store) const {
    for (int first = thread; first < places; first += kBatch * p.threads) {
      Loaded values[kBatch];
      FASTLSTM_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (first + j * p.threads < places) values[j] = load(first + j * p.threads);
      FASTLSTM_UNROLL
      for (int j = 0; j < kBatch; ++j)
        if (first + j * p.threads < places) store(first + j * p.threads, values[j]);
    }
  }
  // Copies the weights of some k-steps into shared memory. On tensor cores they stand in the order
  // in which a lane's four registers of the A fragment of one mma are read, as one 16-byte load;
  // each register holds the words (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4), where
  // lane = 4 * g + t. Neighbouring threads read what is near in W_hh.
  FASTLSTM_DEVICE void fill(const Elements& element, Range steps) const {
    constexpr int kWords = 16 / int(sizeof(Word)), kWordsOfStep = 32 / int(sizeof(Word));
    const int words = (steps.end - steps.first) * kWordsOfStep;  // of a row
    const int w0 = steps.first * kWordsOfStep;
    Word* const to = reinterpret_cast<Word*>(shared);
    const auto keep = [&](int m, int w, Word value) {
      int at = m * l.weight_stride + w;
      if constexpr (kTensorCores) {
        const int lane = m % 8 * 4 + w % 4, reg = m % 16 / 8 + w % 8 / 4 * 2;
        at = (m / 16 * (words / 8) + w / 8) * (kWarp * 4) + lane * 4 + reg;
      }
      to[at] = word_for_product<kMath>(value);
    };
    if (!element.by16()) {
      const int width = kBackward ? l.m_rows : words;
      const Divider by(width);
      copy<Word>(
          l.m_rows * words,
          [&](int i) {
            const int q = by(i), r = i - q * width;
            return element.word(kBackward ? r : q, w0 + (kBackward ? q : r));
          },
          [&](int i, Word value) {
            const int q = by(i), r = i - q * width;
            keep(kBackward ? r : q, kBackward ? q : r, value);
          });
    } else if (!kBackward) {
      const int width = words / kWords;  // a row of W_hh is a row of the weights
      const Divider by(width);
      copy<Vec16>(
          l.m_rows * width,
          [&](int i) {
            const int m = by(i);
            return element.vector(m, w0 * kPerWord + (i - m * width) * kPer16);
          },
          [&](int i, const Vec16& value) {
            const int m = by(i), w = (i - m * width) * kWords;
            Word parts[kWords];
            unpack(parts, value);
            FASTLSTM_UNROLL
            for (int j = 0; j < kWords; ++j) keep(m, w + j, parts[j]);
          });
    } else {
      const int width = (l.m_rows + kPer16 - 1) / kPer16;  // a row is a column of the weights
      const Divider by(width);
      struct Rows {
        Vec16 row[kPerWord];
      };
      copy<Rows>(
          width * words,
          [&](int i) {
            const int w = by(i), m = (i - w * width) * kPer16;
            Rows rows;
            FASTLSTM_UNROLL
            for (int j = 0; j < kPerWord; ++j)
              rows.row[j] = element.vector(m, (w0 + w) * kPerWord + j);
            return rows;
          },
          [&](int i, const Rows& rows) {
            const int w = by(i), m = (i - w * width) * kPer16;
            Storage parts[kPerWord][kPer16];
            FASTLSTM_UNROLL
            for (int j = 0; j < kPerWord; ++j) unpack(parts[j], rows.row[j]);
            FASTLSTM_UNROLL
            for (int k = 0; k < kPer16; ++k) {
              Storage pair[kPerWord];
              FASTLSTM_UNROLL
              for (int j = 0; j < kPerWord; ++j) pair[j] = parts[j][k];
              if (m + k < l.m_rows) keep(m + k, w, word_of<Word>(pair));
            }
          });
    }
  }
  // Fills the registers, by way of shared memory: as many k-steps at a time as have room there.
  FASTLSTM_DEVICE void hold(const Elements& element) {
    const int all = l.held * l.splits, most = l.barriers / (l.m_tiles * kWarp * 16);
    for (int first = 0; first < all; first += most) {
      const Range steps{first, at_most(first + most, all)};
      fill(element, steps);
      sync_block();
      FASTLSTM_UNROLL
      for (int i = 0; i < kRegisters; ++i) {
        const int k = split * l.held + i;
        if (m_first < l.m_tiles && i < l.held && k >= steps.first && k < steps.end)
          held[i] = *fragment(m_first, k - steps.first, steps.end - steps.first);
      }
      sync_block();
    }
  }
  // This lane's part of the A fragment of a k-step, where there are so many for each tile of rows.
  FASTLSTM_DEVICE const Vec16* fragment(int m, int step, int steps) const {
    return reinterpret_cast<const Vec16*>(shared) + (m * steps + step) * kWarp + thread % kWarp;
  }

  // Copies this block's part of W_hh into registers and shared memory, padded with zeros, and
  // clears the operands.
  FASTLSTM_DEVICE void begin() {
    const Elements element(*this);
    if constexpr (kRegisters > 0) hold(element);
    fill(element, {l.held * l.splits, l.k_steps});
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

  FASTLSTM_DEVICE bool in_cluster() const { return !kGrid && p.blocks > 1; }
  FASTLSTM_DEVICE uint64_t* barrier(int which) const {
    return reinterpret_cast<uint64_t*>(shared + l.barriers) + which;
  }
  FASTLSTM_DEVICE Storage* operand(int which) const {
    return reinterpret_cast<Storage*>(shared + l.operand + which * l.operand_bytes);
  }
  // Writes a part of this thread's element e of the next operand, for all blocks of the group; in a
  // cluster arrive() sends it to the others.
  FASTLSTM_DEVICE void publish(int e, int part, Sum value) {
    const int at = published[part] + e * publish_step;
    if constexpr (kGrid) {
      Storage* const to = reinterpret_cast<Storage*>(exchange) + at;
      // A NaN that comes from outside may have all bits set.
      store_relaxed(to, for_product<kMath>(to_storage<Storage>(value == value ? value : Sum(NAN))));
      if (part == kParts - 1)
        for (int i = 1; i <= padding; ++i) store_relaxed(to + i, Storage{});
    } else {
      operand(slot ^ 1)[at] = for_product<kMath>(to_storage<Storage>(value));
    }
  }
  // After all publishing; what stands between arrive and wait does not delay the others.
  FASTLSTM_DEVICE void arrive() {
    ++tick;
    if constexpr (kGrid) exchange += l.operand_bytes;
    if (!in_cluster()) return;
    sync_block();
    send();
  }
  FASTLSTM_DEVICE void begin_slice(int rows) {
    slice_rows = rows;
    if (!in_cluster()) return;
    send_places = rows * kParts * of_part();
    send_width = at_most(send_places, p.threads);
    send_side = thread / send_width;
    send_sides = p.threads / send_width;
    send_first = send_side < send_sides ? thread % send_width : send_places;
    send_at = sent(at_most(send_first, send_places - 1));
    pin(send_at);
  }
  // Where a place stands in an operand, in units of 16 bytes.
  FASTLSTM_DEVICE int sent(int place) const {
    const int part_of = place / of_part(), n = part_of / kParts, part = part_of % kParts;
    return n * (l.stride / kPer16) + (part * p.blocks + rank) * of_part() + place % of_part();
  }
  FASTLSTM_DEVICE int of_part() const {
    return l.unit_stride * int(sizeof(Storage)) / 16;  // places of a part of a row
  }
  // Stores this block's part of the next operand into the shared memory of its peers.
  FASTLSTM_DEVICE void send() {
    uint64_t* const counter = barrier(slot ^ 1);
    const int peers = p.blocks - 1;
    if (thread == 0) barrier_expect(counter, peers * send_places * 16);
    Vec16* const to = reinterpret_cast<Vec16*>(operand(slot ^ 1));
    for (int place = send_first; place < send_places; place += send_width) {
      Vec16* const at = to + (place == send_first ? send_at : sent(place));
      const Vec16 value = *at;
      for (int i = send_side; i < peers; i += send_sides) {
        const int peer = rank + 1 + i;
        store_to_peer(at, value, counter, peer < p.blocks ? peer : peer - p.blocks);
      }
    }
  }
  // Returns when the next operand is complete and the one before it is free to be written; without
  // a cluster `fetch` waits for what it reads.
  FASTLSTM_DEVICE void wait() {
    if (in_cluster())
      barrier_wait(barrier(slot ^ 1), (tick - 1) / 2 % 2);
    else if (!kGrid)
      sync_block();
    slot ^= 1;
  }

  // out = weights * operand^T, as partial sums in shared memory. All threads see them on return.
  FASTLSTM_DEVICE void product() {
    const int chunks = kGrid ? p.chunks : 1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if constexpr (kGrid) fetch(chunk);
      const int from = kGrid ? 0 : slot * l.operand_bytes, warps = p.threads / kWarp;
      for (int m = m_first; m < l.m_tiles; m += warps) {
        // Registers hold weights only where no warp has a second tile.
        const int more = kRegisters > 0 ? 0 : m - m_first;
        for (int n = 0; n < l.n_tiles;) {
          if (kMostTiles == 4 && l.n_tiles - n >= 4) {
            tiles<kMostTiles>(from, chunk, more, n);
            n += kMostTiles;
          } else if (l.n_tiles - n >= 2) {
            tiles<2>(from, chunk, more, n);
            n += 2;
          } else {
            tiles<1>(from, chunk, more, n);
            n += 1;
          }
        }
        if constexpr (kRegisters > 0) break;
      }
      sync_block();
    }
  }
  // Copies a part of the operand into shared memory, each 16 bytes of it as soon as all their
  // elements have come: nothing that is published has all bits set, which is what was there before.
  FASTLSTM_DEVICE void fetch(int chunk) {
    const int per_row = l.chunk_steps * 2;
    int left = slice_rows * per_row, column = fetch_column,
        at = fetch_at;  // places for all threads
    while (left > 0) {
      if (left <= 2 * p.threads || (kWide && !kTensorCores))
        fetch_some<2>(chunk, left, column, at);
      else if (kWide || left <= 4 * p.threads)
        fetch_some<4>(chunk, left, column, at);
      else
        fetch_some<8>(chunk, left, column, at);
    }
    sync_block();
  }
  // So many places of each thread, all of them under way at once.
  template <int kCount>
  FASTLSTM_DEVICE void fetch_some(int chunk, int& left, int& column, int& at) {
    const Vec16* const from =
        reinterpret_cast<const Vec16*>(exchange - l.operand_bytes + chunk * l.chunk_bytes);
    Vec16* const to = reinterpret_cast<Vec16*>(operand(0));
    const int per_row = l.chunk_steps * 2;
    const int columns = (l.K + kPer16 - 1) / kPer16 - chunk * per_row;  // more are never written
    Vec16 values[kCount];
    int places[kCount];
    uint32_t waits = 0;  // a bit for each
    FASTLSTM_UNROLL
    for (int j = 0; j < kCount; ++j) {
      places[j] = at;
      if (thread + j * p.threads < left && column < columns) waits |= 1u << j;
      at += fetch_step;
      column += fetch_columns;
      if (column >= per_row) {
        column -= per_row;
        at += l.stride / kPer16 - per_row;
      }
    }
    left -= kCount * p.threads;
    while (waits) {
      FASTLSTM_UNROLL
      for (int j = 0; j < kCount; ++j)
        if (waits >> j & 1) values[j] = load_relaxed<Storage>(from + places[j]);
      FASTLSTM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (!(waits >> j & 1)) continue;
        if (!has_come(values[j])) continue;
        to[places[j]] = values[j];
        waits &= ~(1u << j);
      }
    }
  }
  // Whether all elements of 16 bytes are there.
  FASTLSTM_DEVICE static bool has_come(const Vec16& v) {
    constexpr int kBytes = int(sizeof(Storage));
    bool come = true;
    FASTLSTM_UNROLL
    for (int i = 0; i < 4; i += kBytes == 8 ? 2 : 1) {
      const uint32_t unset = ~(kBytes == 8 ? v.words[i] & v.words[i + 1] : v.words[i]);
      if constexpr (kBytes == 2)  // is one half of the word zero?
        come = come && !((unset - 0x00010001u) & ~unset & 0x80008000u);
      else
        come = come && unset != 0;
    }
    return come;
  }
  // The outputs of a unit and a row.
  struct alignas(kSums * sizeof(Sum) > 16 ? 16 : kSums * sizeof(Sum)) Sums {
    Sum of[kSums];
  };
  FASTLSTM_DEVICE Sums product_at(int e) const {
    const char* from = shared + in_at + e * in_step;
    Sums sums = *reinterpret_cast<const Sums*>(from);
    FASTLSTM_UNROLL_2
    for (int split = 1; split < splits; ++split) {
      from += in_split;
      const Sums more = *reinterpret_cast<const Sums*>(from);
      FASTLSTM_UNROLL
      for (int k = 0; k < kSums; ++k) sums.of[k] += more.of[k];
    }
    return sums;
  }

  // One warp: the tile of rows m_first + more by the kTiles tiles of columns from n on, over the
  // k-steps of its split, with the operand `from` bytes after the first. Tensor cores take long for
  // one mma, so four are under way at once: where there are fewer tiles, several chains over k. A
  // lane has the outputs (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1) of each tile, where its
  // index is 4 * g + q, as mma has it. It adds to its own partial sums of the chunks before.
  template <int kTiles>
  FASTLSTM_DEVICE void tiles(int from, int chunk, int more, int n) const {
    constexpr int kChains = kTensorCores ? 4 / kTiles : 1;
    Sum sums[kChains][kTiles][4] = {};
    const Range range = chunk ? kept_in(chunk) : kept;
    if constexpr (kTensorCores) {
      const int row_bytes = l.stride * int(sizeof(Storage));
      const char* const rows = shared + b_at + from + n * 8 * row_bytes;
      // So many k-steps, `at` bytes into this part of the operand; all loads come before the
      // products.
      const auto add = [&](auto steps, const Vec16* a, int at) {
        constexpr int kSteps = decltype(steps)::value;
        uint32_t b[kSteps / 2][kTiles][4];
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps / 2; ++i) {
          FASTLSTM_UNROLL
          for (int j = 0; j < kTiles; ++j)
            load_b(b[i][j], rows + at + j * 8 * row_bytes + i * 64, row_bytes);
        }
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          FASTLSTM_UNROLL
          for (int j = 0; j < kTiles; ++j)
            mma<kMath>(sums[i % kChains][j], a[i], b[i / 2][j][i % 2 * 2],
                       b[i / 2][j][i % 2 * 2 + 1]);
        }
      };
      if constexpr (kRegisters > 0) {
        if (chunk == 0) {
          FASTLSTM_UNROLL
          for (int i = 0; i < kRegisters; i += kGroup)
            if (i < l.held) add(Steps<kGroup>(), held + i, b_held + i * 32);
        }
      }
      const Vec16* weights = reinterpret_cast<const Vec16*>(shared + a_at) +
                             (more * l.kept_steps + range.first - kept.first) * kWarp;
      int k = range.first - chunk * l.chunk_steps;
      const int end = range.end - chunk * l.chunk_steps;
      const auto add_kept = [&](auto steps) {
        constexpr int kSteps = decltype(steps)::value;
        Vec16 a[kSteps];
        FASTLSTM_UNROLL
        for (int i = 0; i < kSteps; ++i) a[i] = weights[i * kWarp];
        add(steps, a, k * 32);
        weights += kSteps * kWarp;
        k += kSteps;
      };
      while (k + 4 <= end) add_kept(Steps<4>());
      if (k < end) add_kept(Steps<2>());
    } else {
      for (int k = range.first; k < range.end; ++k)
        multiply(sums[0], from, m_first + more, n, k, k - chunk * l.chunk_steps);
    }

    char* const out = shared + out_at + n * 8 * out_row + more * 16 * int(sizeof(Sum));
    FASTLSTM_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      FASTLSTM_UNROLL
      for (int e = 0; e < 4; ++e) {
        Sum sum = sums[0][j][e];
        FASTLSTM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum += sums[chain][j][e];
        Sum& at = reinterpret_cast<Sum*>(out + (j * 8 + e % 2) * out_row)[e / 2 * 8];
        at = chunk ? at + sum : sum;
      }
    }
  }

  // Without tensor cores: adds k-step k of the weights, which is `step` of the part of the operand.
  template <int kTiles>
  FASTLSTM_DEVICE void multiply(Sum (&sums)[kTiles][4], int from, int m, int n, int k,
                                int step) const {
    const Vec16* const weights = reinterpret_cast<const Vec16*>(shared);
    const Storage* const rows = reinterpret_cast<const Storage*>(shared + l.operand + from);
    const int lane = thread % kWarp, g = lane / 4, q = lane % 4;
    // Rows beyond the last are the last once more; nobody reads their sums.
    const int row16 = l.weight_stride / kPer16;
    const int m0 = at_most(m * 16 + g, l.m_rows - 1), m1 = at_most(m * 16 + g + 8, l.m_rows - 1);
    FASTLSTM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int at = (2 * step + half) * kPer16, at16 = 2 * k + half;
      Storage a0[kPer16], a1[kPer16], b0[kPer16], b1[kPer16];
      unpack(a0, weights[m0 * row16 + at16]);
      unpack(a1, weights[m1 * row16 + at16]);
      FASTLSTM_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const int column = (n + j) * 8 + 2 * q;
        unpack(b0, load16(rows + at_most(column, l.r_rows - 1) * l.stride + at));
        unpack(b1, load16(rows + at_most(column + 1, l.r_rows - 1) * l.stride + at));
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

// The rows of a time, of a slice that begins at batch row n0.
struct Time {
  int64_t row;  // of all times; of the slice's first batch row
  int active;   // rows of the slice that take part, or less than 1
};
FASTLSTM_DEVICE Time time_of(const Recurrence& p, int t, int n0, int rows) {
  if (!p.offsets) return {int64_t(t) * p.N + n0, rows};
  const int64_t first = p.offsets[t];
  return {first + n0, at_most(int(p.offsets[t + 1] - first) - n0, rows)};
}

template <Math kMath, bool kWide, bool kGrid>
FASTLSTM_DEVICE void recurrence_forward(const Task& task) {
  const Recurrence& p = task.p;
  using B = Block<kMath, false, kWide, kGrid>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  constexpr int kOwned = B::kOwned;
  B b(task);
  b.begin();

  const int H = p.H, d = b.direction, unit = b.unit0 + b.u;
  Sum bias[4];
  FASTLSTM_UNROLL
  for (int k = 0; k < 4; ++k)
    bias[k] = b.u < b.units ? to_sum(read<Storage>(p.bias[d], k * H + unit)) : Sum(0);
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = at_most(p.N - n0, p.rows);
    b.begin_slice(rows);
    // Of the next step, on its way while the group meets: the input's part of the gates. It is
    // converted only where it is needed, since that would wait for it.
    Storage in[kOwned][4];
    Sum c[kOwned], h[kOwned];
    // The time of step s; after the last one without rows, at an address of memory.
    const auto time = [&](int s) {
      if (s >= p.T) return Time{0, 0};
      return time_of(p, d ? p.T - 1 - s : s, n0, rows);
    };
    const auto load = [&](const Time& now) {
      const auto gx = moved<Storage>(p.gx, (d * p.total + now.row) * 4 * H + unit);
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= now.active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) in[e][k] = gx[(4 * n + k) * H];
      }
    };

    const int64_t first = (int64_t(d) * p.N + n0) * H + unit;
    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      c[e] = to_sum(read<Storage>(p.c0, first + n * H));
      h[e] = to_sum(read<Storage>(p.h0, first + n * H));
      b.publish(e, 0, h[e]);
    }
    b.arrive();
    Time now = time(0);
    load(now);
    b.wait();

    for (int s = 0; s < p.T; ++s) {
      b.product();
      // What leaves is written while the group meets, and its place is not found before that. But
      // many elements would take too many registers.
      Storage *y, *cells, *gates;
      const auto find = [&](int64_t row) {
        const int64_t kept = (d * p.total + row) * H;
        y = moved<Storage>(p.y, (row * p.directions + d) * H + unit);
        cells = moved<Storage>(p.cells, kept + unit);
        gates = moved<Storage>(p.gates, 4 * kept + unit);
      };
      if (kWide) find(now.row);
      const auto store = [&](int n, const Sum(&z)[4], Sum h, Sum c) {
        y[n * p.directions * H] = to_storage<Storage>(h);
        if (!gates) return;
        cells[n * H] = to_storage<Storage>(c);
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) gates[(4 * n + k) * H] = to_storage<Storage>(z[k]);
      };
      Sum z[kWide ? 1 : kOwned][4];
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows) continue;
        Sum(&own)[4] = z[kWide ? 0 : e];
        if (n < now.active) {
          const auto sums = b.product_at(e);
          FASTLSTM_UNROLL
          for (int k = 0; k < 4; ++k) own[k] = sums.of[k] + (to_sum(in[e][k]) + bias[k]);
          h[e] = cell_forward<kMath>(own, c[e]);
          if (kWide) store(n, own, h[e], c[e]);
        }
        b.publish(e, 0, h[e]);
      }
      b.arrive();
      const Time next = time(s + 1);
      load(next);
      if (!kWide) {
        pin(now.row);
        find(now.row);
        FASTLSTM_UNROLL
        for (int e = 0; e < kOwned; ++e)
          if (b.row(e) < now.active) store(b.row(e), z[kWide ? 0 : e], h[e], c[e]);
      }
      now = next;
      b.wait();
    }

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      write<Storage>(p.c_n, first + n * H, c[e]);
      write<Storage>(p.h_n, first + n * H, h[e]);
    }
  }
}

// A row that does not take part in a time publishes dz = 0 and keeps what reaches its h: before its
// last step that is grad_h, after its first step dh0. So ragged batches need nothing else.
template <Math kMath, bool kWide, bool kGrid>
FASTLSTM_DEVICE void recurrence_backward(const Task& task) {
  const Recurrence& p = task.p;
  using B = Block<kMath, true, kWide, kGrid>;
  using Storage = typename B::Storage;
  using Sum = typename B::Sum;
  constexpr int kOwned = B::kOwned;
  B b(task);
  b.begin();

  const int H = p.H, d = b.direction, unit = b.unit0 + b.u;
  const int slices = (p.N + p.rows - 1) / p.rows;
  for (int slice = b.group / p.directions; slice < slices; slice += p.groups / p.directions) {
    const int n0 = slice * p.rows, rows = at_most(p.N - n0, p.rows);
    b.begin_slice(rows);
    Storage gates[kOwned][4], c[kOwned], c_before[kOwned], grad[kOwned];
    Sum dc[kOwned], dh[kOwned];
    const int64_t first = (int64_t(d) * p.N + n0) * H + unit;
    // The time of step s; after the last one without rows, at an address of memory.
    const auto time = [&](int s) {
      if (s >= p.T) return Time{0, 0};
      return time_of(p, d ? s : p.T - 1 - s, n0, rows);
    };
    // Where these are absent, as much of the cells is loaded in their place and not used: to put a
    // zero there at once would wait for the load.
    const Storage* grad_y = moved<Storage>(p.grad_y ? p.grad_y : p.cells, d * H + unit);
    const Storage* c0 = moved<Storage>(p.c0 ? p.c0 : p.cells, first);
    pin(grad_y);
    pin(c0);
    // `before` is the time whose state that of step `now` started from.
    const auto load = [&](const Time& now, const Time& before) {
      const int64_t kept = (d * p.total + now.row) * H + unit;
      const auto z = moved<Storage>(p.gates, 4 * (kept - unit) + unit);
      const auto cells = moved<Storage>(p.cells, kept);
      const auto grad_now = grad_y + now.row * p.directions * H;
      const auto cells_before = cells + (before.active > 0 ? (before.row - now.row) * H : 0);
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= now.active) continue;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) gates[e][k] = z[(4 * n + k) * H];
        c[e] = cells[n * H];
        const bool inside = n < before.active;
        c_before[e] = (inside ? cells_before : c0)[n * H];
        grad[e] = grad_now[n * p.directions * H];
      }
    };

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      dc[e] = to_sum(read<Storage>(p.grad_c, first + n * H));
      dh[e] = to_sum(read<Storage>(p.grad_h, first + n * H));
      FASTLSTM_UNROLL
      for (int k = 0; k < 4; ++k) b.publish(e, k, Sum(0));
    }
    b.arrive();
    Time now = time(0), before = time(1);
    load(now, before);
    b.wait();

    for (int s = 0;; ++s) {
      b.product();
      if (s == p.T) break;
      Storage* dz;
      const auto find = [&](int64_t row) {
        dz = moved<Storage>(p.dz, (d * p.total + row) * 4 * H + unit);
      };
      if (kWide) find(now.row);
      const auto store = [&](int n, const Sum(&own)[4]) {
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) dz[(4 * n + k) * H] = to_storage<Storage>(own[k]);
      };
      Sum z[kWide ? 1 : kOwned][4];
      FASTLSTM_UNROLL
      for (int e = 0; e < kOwned; ++e) {
        const int n = b.row(e);
        if (n >= rows) continue;
        Sum(&own)[4] = z[kWide ? 0 : e];
        const Sum reaches = dh[e] + b.product_at(e).of[0];
        const bool takes_part = n < now.active;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) own[k] = takes_part ? to_sum(gates[e][k]) : Sum(0);
        if (takes_part) {
          const bool from_zero = n >= before.active && !p.c0;
          cell_backward<kMath>(own, to_sum(c[e]), from_zero ? Sum(0) : to_sum(c_before[e]),
                               p.grad_y ? reaches + to_sum(grad[e]) : reaches, dc[e]);
          if (kWide) store(n, own);
        }
        dh[e] = takes_part ? Sum(0) : reaches;
        FASTLSTM_UNROLL
        for (int k = 0; k < 4; ++k) b.publish(e, k, own[k]);
      }
      b.arrive();
      const Time after = time(s + 2);
      load(before, after);
      if (!kWide) {
        pin(now.row);
        find(now.row);
        FASTLSTM_UNROLL
        for (int e = 0; e < kOwned; ++e)
          if (b.row(e) < now.active) store(b.row(e), z[kWide ? 0 : e]);
      }
      now = before;
      before = after;
      b.wait();
    }

    FASTLSTM_UNROLL
    for (int e = 0; e < kOwned; ++e) {
      const int n = b.row(e);
      if (n >= rows) continue;
      write<Storage>(p.dc0, first + n * H, dc[e]);
      write<Storage>(p.dh0, first + n * H, dh[e] + b.product_at(e).of[0]);
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
