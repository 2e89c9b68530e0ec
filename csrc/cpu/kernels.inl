// The one source of every kernel. Each kernels_<isa>.cpp defines FASTLSTM_ISA, is compiled with
// that ISA's flags and includes this file. No STL here: an inline function of the library compiled
// for AVX-512 could be the copy the linker keeps, and an older CPU would die on it.
//
// From the top: the tile product (the only inner loop of matrix products), pack and transpose, the
// product over rows and panels, the LSTM step forward and backward.

namespace fastlstm {
namespace FASTLSTM_ISA {
namespace {

// clang-format off: vec.h first, vec_math.h is written with it
#include "vec.h"
#include "vec_math.h"
// clang-format on

template <int I>
struct Int {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};

// f(Int<0>()), ..., f(Int<N - 1>()): a loop without a loop. An array of vectors whose indices are
// all such constants is kept in registers by every compiler. One that loops go through is stored in
// every round by GCC before 12, by GCC for Arm and by Clang: a product then takes 2.5 times as
// long.
template <class F, int... I>
FASTLSTM_INLINE void unrolled(F&& f, Lanes<I...>) {
  (f(Int<I>()), ...);
}
template <int N, class F>
FASTLSTM_INLINE void unrolled(F&& f) {
  unrolled(f, typename CountLanes<N>::type());
}

// f(Int<n>()) for 1 <= n <= Most.
template <int Most, class F>
FASTLSTM_INLINE void with_int(int64_t n, F&& f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_int<Most - 1>(n, f);
  }
  f(Int<Most>());
}

// Cuts rows m0..m1 into tiles of nearly equal height and calls f(first row, Int<height>()).
template <class F>
FASTLSTM_INLINE void for_tiles(int64_t m0, int64_t m1, F&& f) {
  int64_t left = (m1 - m0 + kTileRows - 1) / kTileRows;
  for (int64_t m = m0; left > 0; --left) {
    int64_t height = (m1 - m + left - 1) / left;
    with_int<kTileRows>(height, [&](auto rows) { f(m, rows); });
    m += height;
  }
}

// f(panel, panel after it or -1) for p0 <= panel < p1, ascending at even steps and descending at
// odd ones: a step begins with the panels that the step before left in the caches.
template <class F>
FASTLSTM_INLINE void for_panels(int64_t step, int64_t p0, int64_t p1, F&& f) {
  const int64_t way = step % 2 ? -1 : 1;
  const int64_t first = step % 2 ? p1 - 1 : p0;
  for (int64_t k = 0; k < p1 - p0; ++k) {
    const int64_t p = first + way * k;
    f(p, k + 1 < p1 - p0 ? p + way : -1);
  }
}

// Lanes of a partial vector, or all of them at compile time.
struct AllLanes {
  template <class S>
  FASTLSTM_INLINE auto get(const S* p) const {
    return load(p);
  }
  template <class S, class V>
  FASTLSTM_INLINE void put(S* p, V v) const {
    store(p, v);
  }
};
struct FirstLanes {
  int64_t width;
  template <class S>
  FASTLSTM_INLINE auto get(const S* p) const {
    return load(p, width);
  }
  template <class S, class V>
  FASTLSTM_INLINE void put(S* p, V v) const {
    store(p, v, width);
  }
};
template <class T, class F>
FASTLSTM_INLINE void with_lanes(int64_t left, F&& f) {
  if (left >= lanes<T>())
    f(AllLanes());
  else
    f(FirstLanes{left});
}

template <class S>
struct Type {
  using type = S;
};

// f(Type<S>()) for the type S that `element` is of T.
template <class T, class F>
FASTLSTM_INLINE void with_type(Element element, F&& f) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (element == Element::float16) return f(Type<Float16>());
    if (element == Element::bfloat16) return f(Type<BFloat16>());
  }
  f(Type<T>());
}
// f(pointer to the elements of a matrix).
template <class T, class F>
FASTLSTM_INLINE void with_elements(const Matrix<T>& w, F&& f) {
  with_type<T>(w.element,
               [&](auto type) { f(static_cast<const typename decltype(type)::type*>(w.data)); });
}

template <class S>
FASTLSTM_INLINE Rows<const S> rows_of(const S* matrix, int64_t columns) {
  return {matrix, columns};
}

template <class T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // elements of a cache line
// For __builtin_prefetch, of what the cells of a tile take: L1 or, where it is more, L2.
constexpr int kNear = kVectorBytes > 32 ? 2 : 3;

// Panels that do not fit into L2 come from afar. Each of the first tiles of a panel brings in one
// part of the next panel, the others nothing: a prefetch takes the place of a load.
constexpr int64_t kNearBytes = 512 << 10;  // of the panels that a thread goes through
constexpr int64_t panel_bytes(int64_t depth) { return kPanelVectors * kVectorBytes * depth; }
FASTLSTM_INLINE bool from_afar(int64_t panels, int64_t depth) {
  return panels * panel_bytes(depth) > kNearBytes;
}
// Whether a panel is better read chain by chain, each for all of the batch rows: L2 has no room for
// it beside the next one, the rows and what other programs need. CPUs with AVX-512 have more.
FASTLSTM_INLINE bool by_chains(int64_t depth, int64_t rows) {
  constexpr int64_t kMost = 96 << 10;
  return kVectorBytes < 64 && rows > kTileRows && panel_bytes(depth) > kMost;
}
template <class T>
constexpr int64_t kPrefetched = kLine<T> / 2;  // elements per k
template <class T>
FASTLSTM_INLINE const T* next_part(const T* next, int64_t row, int64_t depth) {
  constexpr int64_t kParts = kPanelVectors * lanes<T>() / kPrefetched<T>;
  const int64_t part = row / kTileRows;
  return next && part < kParts ? next + part * depth * kPrefetched<T> : nullptr;
}

// The next `bytes` of what is to be brought in.
FASTLSTM_INLINE const void* next_part(Ahead* ahead, int64_t bytes) {
  while (ahead->run < Ahead::kRuns && ahead->place >= ahead->runs[ahead->run].bytes) {
    ++ahead->run;
    ahead->place = 0;
  }
  if (ahead->run == Ahead::kRuns) return nullptr;
  const auto* part = static_cast<const char*>(ahead->runs[ahead->run].data) + ahead->place;
  ahead->place += bytes;
  return part;
}

// ---- the tile product ---------------------------------------------------------------------------

// f(Int<m>(), Int<n>()) for all sums of a tile.
template <int M, int N, class F>
FASTLSTM_INLINE void for_sums(F&& f) {
  unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA {
    unrolled<N>([&](auto n) FASTLSTM_INLINE_LAMBDA { f(m, n); });
  });
}
template <class V, int M, int N>
FASTLSTM_INLINE void clear(V (&sums)[M][N]) {
  for_sums<M, N>([&](auto m, auto n) FASTLSTM_INLINE_LAMBDA { sums[m][n] = V{}; });
}
template <class V, int M, int N>
FASTLSTM_INLINE void copy(const V (&from)[M][N], V (&to)[M][N]) {
  for_sums<M, N>([&](auto m, auto n) FASTLSTM_INLINE_LAMBDA { to[m][n] = from[m][n]; });
}

// Most terms of a product that one chain of additions takes, up to whole rounds of the loop. Longer
// chains round worse: at 384 more cases pass nn.LSTM's error and 1e-6. A cut costs some 50 cycles.
constexpr int64_t kChain = 320;
// Of chains of nearly equal length, in whole rounds of the loop below.
FASTLSTM_INLINE int64_t chain_length(int64_t depth) {
  const int64_t chains = (depth + kChain - 1) / kChain;
  return chains > 1 ? (depth / chains + 4) / 4 * 4 : depth;
}

// sums[m][v] += sum_k a[m][k] * b[k * step + v * VL ...] in the order of k.
// The broadcasts are held and the panel's vectors come one at a time: that order fits the register
// file exactly; the other one spills. `ahead`, if any, is memory to bring into L2 alongside, half a
// cache line for each k: see next_part.
template <class T, int M, int V>
FASTLSTM_INLINE void add_chain(const T* const (&a)[M], int64_t depth, const T* b, int64_t step,
                               const T* ahead, Vec<T> (&sums)[M][V]) {
  const auto add = [&](auto bring) FASTLSTM_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
      if (bring && k % 2 == 0) __builtin_prefetch(ahead + k * kPrefetched<T>, 0, 2);
      Vec<T> row[M];
      unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA { row[m] = broadcast(a[m][k]); });
      unrolled<V>([&](auto v) FASTLSTM_INLINE_LAMBDA {
        const Vec<T> column = load(b + k * step + v * lanes<T>());
        unrolled<M>([&](auto m)
                        FASTLSTM_INLINE_LAMBDA { sums[m][v] = fma(row[m], column, sums[m][v]); });
#if defined(__clang__) && defined(__AVX2__) && !defined(__AVX512F__)
        __asm__("" : "+x"(sums[M - 1][v]), "+r"(b));  // it would load the columns ahead, and spill
#endif
      });
    }
  };
  if (M > 1 && ahead)
    add(Int<1>());
  else
    add(Int<0>());
}

// The same in chains, whose sums are added in order.
template <class T, int M, int V>
__attribute__((noinline)) void add_chains(const T* const (&a)[M], int64_t depth, const T* b,
                                          int64_t step, const T* ahead, Vec<T> (&total)[M][V]) {
  const int64_t length = chain_length(depth);
  Vec<T> sums[M][V];
  copy(total, sums);
  for (int64_t from = 0; from < depth; from += length) {
    const T* left[M];
    unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA { left[m] = a[m] + from; });
    add_chain<T>(left, depth - from < length ? depth - from : length, b + from * step, step,
                 ahead ? ahead + from * kPrefetched<T> : nullptr, sums);
    for_sums<M, V>([&](auto m, auto v) FASTLSTM_INLINE_LAMBDA {
      total[m][v] = from ? total[m][v] + sums[m][v] : sums[m][v];
      sums[m][v] = Vec<T>{};
    });
  }
}

template <class T, int M, int V>
FASTLSTM_INLINE void multiply(const T* const (&a)[M], int64_t depth, const T* b, int64_t step,
                              const T* ahead, Vec<T> (&sums)[M][V]) {
  if (depth <= kChain) return add_chain<T>(a, depth, b, step, ahead, sums);
  Vec<T> total[M][V];  // a copy, since what another function takes is no longer in registers
  copy(sums, total);
  add_chains<T>(a, depth, b, step, ahead, total);
  copy(total, sums);
}

// Sums of a panel for some batch rows: z[n][v * VL ...].
template <class T>
using PanelSums = T (*)[kPanelVectors * lanes<T>()];

// z[n - n0] += sum_k a[n][k] * b[k * step ...] for n0 <= n < n1, with the bits of multiply(), but
// chain by chain for all of these rows, so that what a chain takes of the panel stays in L1.
// `after` is what to bring in at the end.
template <class T>
void multiply_by_chains(Rows<const T> a, int64_t n0, int64_t n1, int64_t depth, const T* b,
                        int64_t step, const T* after, PanelSums<T> z) {
  const int64_t length = chain_length(depth);
  for (int64_t from = 0; from < depth; from += length) {
    const int64_t count = depth - from < length ? depth - from : length;
    const T* const part = b + from * step;
    const T* const next = from + count < depth ? part + count * step : after;
    for_tiles(n0, n1, [&](int64_t n, auto rows) {
      constexpr int M = decltype(rows)::value, V = kPanelVectors;
      const T* left[M];
      for (int r = 0; r < M; ++r) left[r] = a.at(0, n + r) + from;
      const auto at = [&](int r, int v)
                          FASTLSTM_INLINE_LAMBDA { return z[n - n0 + r] + v * lanes<T>(); };
      Vec<T> sums[M][V];
      for_sums<M, V>([&](auto r, auto v)
                         FASTLSTM_INLINE_LAMBDA { sums[r][v] = from ? Vec<T>{} : load(at(r, v)); });
      add_chain<T>(left, count, part, step, next_part(next, n - n0, count), sums);
      for_sums<M, V>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA {
        store(at(r, v), from ? load(at(r, v)) + sums[r][v] : sums[r][v]);
      });
    });
  }
}

// f(n, past, z) for parts of n0 <= n < n1, z being zeros for these rows.
template <class T, class F>
FASTLSTM_INLINE void with_panel_sums(int64_t n0, int64_t n1, F&& f) {
  constexpr int64_t kMost = 128;
  T z[kMost][kPanelVectors * lanes<T>()];
  for (int64_t n = n0; n < n1; n += kMost) {
    const int64_t past = n1 - n < kMost ? n1 : n + kMost;
    for (int64_t k = 0; k < past - n; ++k)
      unrolled<kPanelVectors>(
          [&](auto v) FASTLSTM_INLINE_LAMBDA { store(z[k] + v * lanes<T>(), Vec<T>{}); });
    f(n, past, z);
  }
}

// sums[m], in its first lanes: sum_k a[m][k] * edge[j * step + k] for the columns j < W of an edge.
template <class T, int M, int W>
__attribute__((noinline)) void add_edge(const T* const (&a)[M], int64_t depth, const T* edge,
                                        int64_t step, Vec<T> (&sums)[M]) {
  constexpr int VL = lanes<T>(), kRounded = (M * W + VL - 1) / VL * VL;
  Vec<T> products[M][W];
  clear(products);
  for (int64_t k = 0; k < depth; k += VL)
    with_lanes<T>(depth - k, [&](auto part) FASTLSTM_INLINE_LAMBDA {
      Vec<T> row[M];
      unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA { row[m] = part.get(a[m] + k); });
      unrolled<W>([&](auto j) FASTLSTM_INLINE_LAMBDA {
        const Vec<T> column = part.get(edge + j * step + k);
        unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA {
          products[m][j] = fma(row[m], column, products[m][j]);
        });
      });
    });
  Vec<T> each[kRounded] = {};
  for_sums<M, W>([&](auto m, auto j) FASTLSTM_INLINE_LAMBDA { each[m * W + j] = products[m][j]; });
  T found[kRounded];
  for (int i = 0; i < kRounded; i += VL) store(found + i, sum_each<T>(each + i));
  for (int m = 0; m < M; ++m) sums[m] += load(found + m * W, int64_t(W));
}

// sums[m][v] += sum_k a[m][k] B[k][...] for the vectors of panel p, whose last one is an edge.
template <class T, int M, int V>
FASTLSTM_INLINE void multiply_to_edge(const T* const (&a)[M], [[maybe_unused]] int64_t depth,
                                      const Panels<T>& b, [[maybe_unused]] int64_t p,
                                      [[maybe_unused]] const T* ahead, Vec<T> (&sums)[M][V]) {
  if constexpr (V > 1) {
    Vec<T> before[M][V - 1];
    for_sums<M, V - 1>([&](auto m, auto v) FASTLSTM_INLINE_LAMBDA { before[m][v] = sums[m][v]; });
    add_chains<T>(a, depth, b.at(p), b.step(p), ahead, before);
    for_sums<M, V - 1>([&](auto m, auto v) FASTLSTM_INLINE_LAMBDA { sums[m][v] = before[m][v]; });
  }
  if constexpr (lanes<T>() >= 4) {
    Vec<T> last[M];
    for (int m = 0; m < M; ++m) last[m] = sums[m][V - 1];
    with_int<lanes<T>() / 4>(b.edge_columns, [&](auto columns) {
      add_edge<T, M, decltype(columns)::value>(a, depth, b.edge, b.edge_step, last);
    });
    for (int m = 0; m < M; ++m) sums[m][V - 1] = last[m];
  }
}

// ---- pack and transpose -------------------------------------------------------------------------

template <class V>
bool any(V bits) {
  for (unsigned lane = 0; lane < sizeof bits / sizeof bits[0]; ++lane)
    if (bits[lane]) return true;
  return false;
}

// to[c * to_step + r] = from[r * from_step + c] for r < rows, c < columns; zeros for rows <= r <
// VL. Bits are set in what it returns where a number is infinite or NaN.
template <class T, class S, class To>
FASTLSTM_INLINE Bits<T> transpose_strip(const S* from, int64_t from_step, int64_t rows,
                                        int64_t columns, To* to, int64_t to_step, int64_t width) {
  constexpr int VL = lanes<T>();
  Bits<T> found = {};
  for (int64_t c = 0; c < columns; c += VL) {
    const int64_t count = columns - c < VL ? columns - c : VL;
    Vec<T> block[VL];
#pragma GCC unroll 16
    for (int r = 0; r < VL; ++r) {
      if (r >= rows)
        block[r] = Vec<T>{};
      else
        block[r] =
            count == VL ? load(from + r * from_step + c) : load(from + r * from_step + c, count);
      found |= (Bits<T>)(block[r] - block[r]);
    }
    transpose_block<T>(block);
#pragma GCC unroll 16
    for (int l = 0; l < VL; ++l)
      if (l < count) {
        if (width == VL)
          store(to + (c + l) * to_step, block[l]);
        else
          store(to + (c + l) * to_step, block[l], width);
      }
  }
  return found;
}

template <class T>
bool pack_gates(Matrix<T> matrix, int64_t hidden, int64_t depth, int64_t p0, int64_t p1,
                Panels<T> to) {
  constexpr int VL = lanes<T>();
  Bits<T> found = {};
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t units = hidden - p * VL, width = p < to.full ? VL : units;
      for (int64_t gate = 0; gate < kPanelVectors; ++gate)
        found |= transpose_strip<T>(w + (gate * hidden + p * VL) * depth, depth, units, depth,
                                    const_cast<T*>(to.at(p)) + gate * width, to.step(p), width);
    }
  });
  return !any(found);
}

template <class T, class S>
void pack_rows(Rows<const S> b, int64_t k0, int64_t count, int64_t columns, int64_t p0, int64_t p1,
               Panels<T> to) {
  constexpr int VL = lanes<T>();
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t first = p * kPanelVectors * VL;
    const int64_t step = to.step(p), edge = to.has_edge(p) ? to.edge_columns : 0;
    T* out = const_cast<T*>(to.at(p)) + k0 * step;
    for (int64_t k = 0; k < count; ++k, out += step) {
      const S* from = b.row(k) + first;
      for (int64_t v = 0; v < step; v += VL) {
        const int64_t left = columns - first - v;
        store(out + v, left >= VL ? load(from + v) : load(from + v, left));
      }
      if (edge > 0) {
        T last[VL];
        store(last, load(from + step, edge));
        for (int64_t j = 0; j < edge; ++j)
          const_cast<T*>(to.edge)[j * to.edge_step + k0 + k] = last[j];
      }
    }
  }
}

template <class T>
void pack_matrix(Matrix<T> matrix, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                 Panels<T> to) {
  with_elements(matrix,
                [&](auto* w) { pack_rows(rows_of(w, columns), 0, depth, columns, p0, p1, to); });
}

template <class T>
void transpose(Rows<const T> a, int64_t count, int64_t m0, int64_t m1, T* out, int64_t step) {
  constexpr int VL = lanes<T>();
  for (int64_t m = m0; m < m1; m += VL)
    for (int64_t k = 0; k < count; k += VL) {
      const int64_t rows = count - k < VL ? count - k : VL;
      transpose_strip<T>(a.row(k) + m, a.step_n, rows, m1 - m < VL ? m1 - m : VL,
                         out + (m - m0) * step + k, step, rows);
    }
}

template <class T>
void pack_columns(Matrix<T> matrix, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                  Panels<T> to) {
  constexpr int VL = lanes<T>();
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t v = 0; v < to.step(p); v += VL) {
        const int64_t first = p * kPanelVectors * VL + v;
        transpose_strip<T>(w + first * depth, depth, columns - first, depth,
                           const_cast<T*>(to.at(p)) + v, to.step(p), VL);
      }
      for (int64_t j = 0; to.has_edge(p) && j < to.edge_columns; ++j)
        for (int64_t k = 0; k < depth; k += VL)
          with_lanes<T>(depth - k, [&](auto part) {
            part.put(const_cast<T*>(to.edge) + j * to.edge_step + k,
                     part.get(w + (columns - to.edge_columns + j) * depth + k));
          });
    }
  });
}

template <class T>
void sum_rows(const T* a, int64_t step, int64_t rows, int64_t columns, T* out, bool accumulate) {
  constexpr int VL = lanes<T>();
  for (int64_t m = 0; m < rows; m += VL) {
    const int64_t count = rows - m < VL ? rows - m : VL;
    Vec<T> total[VL] = {};
    for (int64_t r = 0; r < count; ++r) {
      const T* from = a + (m + r) * step;
      Vec<T> even{}, odd{};  // so that additions overlap
      int64_t k = 0;
      for (; k + 2 * VL <= columns; k += 2 * VL) {
        even += load(from + k);
        odd += load(from + k + VL);
      }
      for (; k < columns; k += VL)
        even += columns - k < VL ? load(from + k, columns - k) : load(from + k);
      total[r] = even + odd;
    }
    Vec<T> sums = sum_each<T>(total);
    if (accumulate) sums += load(out + m, count);
    store(out + m, sums, count);
  }
}

// ---- products -----------------------------------------------------------------------------------

template <class T>
void one_pass(const Product<T>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  constexpr int VL = lanes<T>();
  const bool far = from_afar(p1 - p0, in.depth);
  for (int64_t p = p0; p < p1; ++p) {
    const T* b = in.b.at(p);
    const T* next = far ? in.b.at(p + 1 < p1 ? p + 1 : p0) : nullptr;
    const int64_t step = in.b.step(p);
    const int64_t first = p * (in.columns.gates ? VL : kPanelVectors * VL);
    const int64_t vector_step = in.columns.gates ? in.columns.count : VL;
    const bool edge = in.b.has_edge(p);
    with_int<kPanelVectors>(p < in.b.full ? kPanelVectors : step / VL + edge, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      int64_t width[V];  // valid lanes of each vector
      for (int v = 0; v < V; ++v) {
        const int64_t left = in.columns.count - first - (in.columns.gates ? 0 : v * VL);
        width[v] = left < VL ? left : VL;
      }
      const bool whole = width[V - 1] == VL;
      const auto tile = [&](auto to_edge, int64_t m, auto rows) FASTLSTM_INLINE_LAMBDA {
        constexpr int M = decltype(rows)::value;
        const T* a[M];
        T* c[M];
        Vec<T> sums[M][V];
        for (int r = 0; r < M; ++r) {
          a[r] = in.a.row(m + r);
          c[r] = in.c.row(m + r) + first;
        }
        unrolled<V>([&](auto v) FASTLSTM_INLINE_LAMBDA {
          Vec<T> start{};
          if (in.start) start = load(in.start + first + v * vector_step, width[v]);
          unrolled<M>([&](auto r) FASTLSTM_INLINE_LAMBDA { sums[r][v] = start; });
        });
        // C comes from afar; ask for it before it is needed. A vector may lie in two cache
        // lines.
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < V; ++v) {
            __builtin_prefetch(c[r] + v * vector_step, 1, 3);
            __builtin_prefetch(c[r] + v * vector_step + VL - 1, 1, 3);
          }
        const T* ahead = next_part(next, m - m0, in.depth);
        if (in.ahead)
          ahead = static_cast<const T*>(next_part(in.ahead, in.depth * kPrefetched<T> * sizeof(T)));
        if constexpr (to_edge)
          multiply_to_edge<T, M, V>(a, in.depth, in.b, p, ahead, sums);
        else
          multiply<T, M, V>(a, in.depth, b, step, ahead, sums);
        for_sums<M, V>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA {
          T* to = c[r] + v * vector_step;
          if (whole)
            store(to, in.accumulate ? sums[r][v] + load(to) : sums[r][v]);
          else
            store(to, in.accumulate ? sums[r][v] + load(to, width[v]) : sums[r][v], width[v]);
        });
      };
      // Apart: with both in one function Clang keeps the sums in memory.
      if (edge)
        for_tiles(m0, m1, [&](int64_t m, auto rows) { tile(Int<1>(), m, rows); });
      else
        for_tiles(m0, m1, [&](int64_t m, auto rows) { tile(Int<0>(), m, rows); });
    });
  }
}

// Longest depth of a pass: its part of a panel stays in L2 while the rows go by, and rereading C
// costs little.
constexpr int64_t kPass = 1024;

template <class T>
void product(const Product<T>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (in.depth <= kPass) return one_pass(in, m0, m1, p0, p1);
  const int64_t passes = (in.depth + kPass - 1) / kPass;
  Product<T> pass = in;
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t k = in.depth * i / passes;
    pass.depth = in.depth * (i + 1) / passes - k;
    pass.a.data = in.a.data + k;
    pass.b = in.b.from_row(k);
    one_pass(pass, m0, m1, p0, p1);
    pass.start = nullptr;
    pass.accumulate = true;
  }
}

template <class T>
void outer(Rows<const T> a, Rows<const T> b, int64_t count, int64_t columns, int64_t m0, int64_t m1,
           T* out) {
  constexpr int VL = lanes<T>(), V = kPanelVectors;
  for (int64_t m = m0; m < m1; ++m) {
    const auto add = [&](auto vectors, int64_t j, auto part) {
      constexpr int W = decltype(vectors)::value;
      Vec<T> sums[1][W];
      clear(sums);
      for (int64_t k = 0; k < count; ++k) {
        const Vec<T> left = broadcast(a.at(0, k)[m]);
        const T* right = b.at(0, k) + j;
        for_sums<1, W>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA {
          sums[r][v] = fma(left, part.get(right + v * VL), sums[r][v]);
        });
      }
      for_sums<1, W>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA {
        part.put(out + m * columns + j + v * VL, sums[r][v]);
      });
    };
    int64_t j = 0;
    for (; j + V * VL <= columns; j += V * VL) add(Int<V>(), j, AllLanes());
    for (; j + VL <= columns; j += VL) add(Int<1>(), j, AllLanes());
    if (j < columns) add(Int<1>(), j, FirstLanes{columns - j});
  }
}

// ---- half precision -----------------------------------------------------------------------------

template <class T>
void widen(const void* from, Element element, int64_t count, T* to) {
  with_type<T>(element, [&](auto type) {
    const auto* const halves = static_cast<const typename decltype(type)::type*>(from);
    for (int64_t k = 0; k < count; k += lanes<T>())
      with_lanes<T>(count - k, [&](auto part) { part.put(to + k, part.get(halves + k)); });
  });
}

template <class T>
void narrow(const T* from, int64_t count, Element element, void* to) {
  with_type<T>(element, [&](auto type) {
    auto* const halves = static_cast<typename decltype(type)::type*>(to);
    for (int64_t k = 0; k < count; k += lanes<T>())
      with_lanes<T>(count - k, [&](auto part) { part.put(halves + k, part.get(from + k)); });
  });
}

// ---- the step forward ---------------------------------------------------------------------------

// A sigmoid as it is kept in float16: its distance from 0 or, negative, from 1, whichever is
// nearer. So gates that are almost closed or open keep 11 bits of it: scaled, float16 has them of
// distances from 2^-30 on. That of 1 is its smallest number, for the sign; 1 - 2^-40 is 1 again.
constexpr float kDistanceScale = 0x1p16f, kSmallest = 0x1p-24f;
FASTLSTM_INLINE Vec<float> distance_of(Vec<float> sigmoid) {
  const Vec<float> from_one = at_most((1 - sigmoid) * -kDistanceScale, broadcast(-kSmallest));
  return sigmoid > 0.5f ? from_one : sigmoid * kDistanceScale;
}
FASTLSTM_INLINE Vec<float> sigmoid_at(Vec<float> distance) {
  const Vec<float> from_end = distance * (1 / kDistanceScale);
  return distance < 0 ? 1 + from_end : from_end;
}

// The cells of R batch rows from n on: gates, c and h of one vector of units each, from z.
template <class T, int R, class L>
FASTLSTM_INLINE void cells_forward(const StepForward<T>& in, int64_t n, int64_t unit,
                                   const Vec<T> (*z)[4], L part) {
  const int64_t H = in.hidden;
  Vec<T> gates[4][R], c[R];
  for (int gate = 0; gate < 4; ++gate)
    for (int r = 0; r < R; ++r)
      gates[gate][r] = gate == 2 ? tanh<T>(z[r][gate]) : sigmoid<T>(z[r][gate]);
  const auto& [i, f, g, o] = gates;
  for (int r = 0; r < R; ++r)
    c[r] = fma(f[r], part.get(in.c_prev.at(0, n + r) + unit), i[r] * g[r]);
  for (int r = 0; r < R; ++r) part.put(in.c.at(0, n + r) + unit, c[r]);
  for (int r = 0; r < R; ++r) part.put(in.h.at(0, n + r) + unit, o[r] * tanh<T>(c[r]));
  const auto keep = [&](auto rows) {
    for (int r = 0; r < R; ++r)
      for (int gate = 0; gate < 4; ++gate)
        part.put(rows.at(0, n + r) + unit + gate * H, gates[gate][r]);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    for (int gate = 0; in.as_distances && gate < 4; ++gate)
      for (int r = 0; r < R; ++r)
        if (gate != 2) gates[gate][r] = distance_of(gates[gate][r]);
    if (in.half_gates.data) keep(in.half_gates);
  }
  if (in.gates.data) keep(in.gates);
}

// The same of the rows of a tile: together, so that their chains of operations overlap; but the
// stores of what training keeps of so many would come at once, and wait for memory.
template <class T, int R, class L>
FASTLSTM_INLINE void cells_of_tile(const StepForward<T>& in, int64_t n, int64_t unit,
                                   const Vec<T> (*z)[4], L part) {
  if (R > 3 && (in.gates.data || in.half_gates.data))
    for (int r = 0; r < R; ++r) cells_forward<T, 1>(in, n + r, unit, z + r, part);
  else
    cells_forward<T, R>(in, n, unit, z, part);
}

// z of M batch rows from n on, `before` of them done, on V vectors of columns of panel p; start(r,
// v) is what the products are added to.
template <class T, int M, int V, class Start>
FASTLSTM_INLINE void gate_sums(const StepForward<T>& in, int64_t n, int64_t before, int64_t p,
                               int64_t next, Start&& start, Vec<T> (&z)[M][V]) {
  constexpr int64_t VL = lanes<T>(), row = kPanelVectors * VL;
  Vec<T> sums[M][V];
  clear(sums);
  const auto add = [&](Rows<const T> from, int64_t depth, const T* w) FASTLSTM_INLINE_LAMBDA {
    const T* a[M];
    for (int r = 0; r < M; ++r) a[r] = from.at(0, n + r);
    const T* ahead = next_part(next < 0 ? nullptr : w + next * depth * row, before, depth);
    multiply<T, M, V>(a, depth, w + p * depth * row, V * VL, ahead, sums);
  };
  // Many small terms first: each addition rounds as coarsely as the sum until then is large.
  add(in.h_prev, in.output, in.w_hh.full());
  for_sums<M, V>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA { sums[r][v] += start(r, v); });
  add(in.x, in.input, in.w_ih.full());
  copy(sums, z);
}

// Batch rows of a tail at a time, and the most vectors that its gates take.
constexpr int64_t kTailRows = 8 * kTileRows;
constexpr int kTailVectors = 2;

// Rows n0 <= n < n1 of a tail, at most kTailRows, whose gates stand beside one another on V
// vectors. Cells are those of as many rows at once as fill the lanes. A load of what was stored in
// pieces waits for them, so it has a loop of its own.
template <class T, int V>
void tail_forward(const StepForward<T>& in, int64_t n0, int64_t n1, int64_t p, int64_t next) {
  constexpr int64_t VL = lanes<T>();
  const int64_t H = in.hidden, unit = p * VL, units = H - unit, at_once = VL / units;
  const FirstLanes part{units};
  T z[kTailRows][V * VL];
  for (int64_t n = n0; n < n1; ++n) {
    const bool copied = n > n0 && in.start.step_n == 0;
    for (int v = 0; v < V; ++v) store(z[n - n0] + v * VL, copied ? load(z[0] + v * VL) : Vec<T>{});
    for (int64_t gate = 0; !copied && gate < 4; ++gate)
      part.put(z[n - n0] + gate * units, part.get(in.start.at(0, n) + unit + gate * H));
  }
  for_tiles(n0, n1, [&](int64_t n, auto rows) {
    constexpr int M = decltype(rows)::value;
    Vec<T> sums[M][V];
    const auto at = [&](int r, int v) FASTLSTM_INLINE_LAMBDA { return z[n - n0 + r] + v * VL; };
    gate_sums<T>(in, n, n - n0, p, next, [&](int r, int v) { return load(at(r, v)); }, sums);
    for_sums<M, V>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA { store(at(r, v), sums[r][v]); });
  });

  // f(row of the batch, its first lane among those of rows at once, these) for all.
  T gates[kTailRows][4][VL], c[kTailRows][VL], h[kTailRows][VL];
  const auto each = [&](auto&& f) {
    for (int64_t n = n0, group = 0; n < n1; ++group)
      for (int64_t k = 0; k < at_once && n < n1; ++k, ++n) f(n, k * units, group);
  };
  each([&](int64_t n, int64_t lane, int64_t group) {
    for (int64_t gate = 0; gate < 4; ++gate)
      part.put(gates[group][gate] + lane, part.get(z[n - n0] + gate * units));
    part.put(c[group] + lane, part.get(in.c_prev.at(0, n) + unit));
  });
  StepForward<T> together{};
  together.hidden = VL;
  together.c_prev = together.c = {c[0], 0, VL};
  together.h = {h[0], 0, VL};
  if (in.gates.data || in.half_gates.data) together.gates = {gates[0][0], 0, 4 * VL};
  together.as_distances = in.as_distances;
  for (int64_t group = 0; group * at_once < n1 - n0; ++group) {
    Vec<T> one[1][4];
    for (int gate = 0; gate < 4; ++gate) one[0][gate] = load(gates[group][gate]);
    cells_forward<T, 1>(together, group, 0, one, AllLanes());
  }
  each([&](int64_t n, int64_t lane, int64_t group) {
    part.put(in.c.at(0, n) + unit, part.get(c[group] + lane));
    part.put(in.h.at(0, n) + unit, part.get(h[group] + lane));
    const auto keep = [&](auto rows) {
      for (int64_t gate = 0; gate < 4; ++gate)
        part.put(rows.at(0, n) + unit + gate * H, part.get(gates[group][gate] + lane));
    };
    if (in.gates.data) keep(in.gates);
    if constexpr (sizeof(T) == sizeof(float))
      if (in.half_gates.data) keep(in.half_gates);
  });
}

// What comes after the product comes from afar where the input product went over time; its loads
// cannot begin before the product ends.
template <class T>
FASTLSTM_INLINE void ask_for_start(const StepForward<T>& in, int64_t n, int64_t unit) {
  if (in.start.step_n == 0) return;
  __builtin_prefetch(in.c_prev.at(0, n) + unit, 0, 2);
  for (int gate = 0; gate < 4; ++gate)
    __builtin_prefetch(in.start.at(0, n) + unit + gate * in.hidden, 0, 2);
}

// The rows n0 <= n < n1 of a panel, chain by chain.
template <class T, class L>
FASTLSTM_INLINE void panel_forward(const StepForward<T>& in, int64_t n0, int64_t n1, int64_t p,
                                   int64_t next, L part) {
  constexpr int64_t VL = lanes<T>(), row = kPanelVectors * VL;
  const int64_t H = in.hidden, unit = p * VL;
  const T* const w_hh = in.w_hh.full();
  const T* const w_ih = in.w_ih.full() + p * in.input * row;
  const T* const after = next < 0 ? nullptr : w_hh + next * in.output * row;
  with_panel_sums<T>(n0, n1, [&](int64_t first, int64_t past, PanelSums<T> z) {
    for (int64_t n = first; n < past; ++n) ask_for_start(in, n, unit);
    multiply_by_chains<T>(in.h_prev, first, past, in.output, w_hh + p * in.output * row, row,
                          in.input ? w_ih : after, z);
    for (int64_t n = first; n < past; ++n)
      for (int64_t gate = 0; gate < 4; ++gate) {
        T* const sum = z[n - first] + gate * VL;
        store(sum, load(sum) + part.get(in.start.at(0, n) + unit + gate * H));
      }
    multiply_by_chains<T>(in.x, first, past, in.input, w_ih, row, after, z);
    for_tiles(first, past, [&](int64_t n, auto rows) {
      constexpr int M = decltype(rows)::value;
      Vec<T> sums[M][4];
      for (int r = 0; r < M; ++r)
        for (int gate = 0; gate < 4; ++gate) sums[r][gate] = load(z[n - first + r] + gate * VL);
      cells_of_tile<T, M>(in, n, unit, sums, part);
    });
  });
}

template <class T>
void step_forward(const StepForward<T>& in, int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
  constexpr int64_t VL = lanes<T>();
  const int64_t H = in.hidden;
  const bool far = from_afar(p1 - p0, in.input + in.output);
  const bool chained = by_chains(in.input + in.output, n1 - n0);
  for_panels(in.step, p0, p1, [&](int64_t p, int64_t next) {
    if (!far) next = -1;
    const int64_t unit = p * VL;
    if (p >= in.full) {
      for (int64_t n = n0; n < n1; n += kTailRows)
        with_int<kTailVectors>((4 * (H - unit) + VL - 1) / VL, [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          tail_forward<T, V>(in, n, n1 - n < kTailRows ? n1 : n + kTailRows, p, next);
        });
      return;
    }
    with_lanes<T>(H - unit, [&](auto part) {
      if (chained) return panel_forward(in, n0, n1, p, next, part);
      for_tiles(n0, n1, [&](int64_t n, auto rows) {
        constexpr int M = decltype(rows)::value;
        for (int r = 0; r < M; ++r) ask_for_start(in, n + r, unit);
        const auto start = [&](int r, int gate) FASTLSTM_INLINE_LAMBDA {
          return part.get(in.start.at(0, n + r) + unit + gate * H);
        };
        Vec<T> z[M][4];
        gate_sums<T>(in, n, n - n0, p, next, start, z);
        cells_of_tile<T, M>(in, n, unit, z, part);
      });
    });
  });
}

// total[c][r][m] += a[m][k] * w[r][k], summed over k within the lanes and in C chains, for R
// neighbouring rows of w.
template <class T, class S, int C, int R, int M>
FASTLSTM_INLINE void dot_rows(const T* const (&a)[M], int64_t depth, const S* w,
                              Vec<T> (&total)[C][R][M]) {
  constexpr int VL = lanes<T>(), kRound = 4;
  const auto add = [&](int64_t k, auto chain, auto part) FASTLSTM_INLINE_LAMBDA {
    Vec<T> row[M];
    unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA { row[m] = part.get(a[m] + k); });
    unrolled<R>([&](auto r) FASTLSTM_INLINE_LAMBDA {
      const Vec<T> column = part.get(w + r * depth + k);
      unrolled<M>([&](auto m) FASTLSTM_INLINE_LAMBDA {
        total[chain][r][m] = fma(row[m], column, total[chain][r][m]);
      });
    });
  };
  int64_t k = 0;
  // Few rows of x: reading the weights takes longest. Fewer rounds of the loop.
  if constexpr (M <= 2)
    for (; k + kRound * VL <= depth; k += kRound * VL) {
#pragma GCC unroll 4
      for (int u = 0; u < kRound; u += C)
        unrolled<C>([&](auto chain)
                        FASTLSTM_INLINE_LAMBDA { add(k + (u + chain) * VL, chain, AllLanes()); });
    }
  for (; k + VL <= depth; k += VL) add(k, Int<0>(), AllLanes());
  if (k < depth) add(k, Int<0>(), FirstLanes{depth - k});
}

// z[m] = the products + start of one gate for the units from `unit` on, of which `width` are there.
// R rows of weights at a time share the loads of x and h; a single one has four chains.
template <int R, class T, class S, int M, class L>
FASTLSTM_INLINE void dot_units(const StepForward<T>& in, const S* w_ih, const S* w_hh,
                               const T* const (&x)[M], const T* const (&h)[M], int64_t n,
                               int64_t gate, int64_t unit, int64_t width, L part, Vec<T> (&z)[M]) {
  constexpr int VL = lanes<T>();
  constexpr int C = R == 1 ? 4 : 1;
  Vec<T> sums[M][VL];
  const auto add = [&](auto count, int64_t l) {
    constexpr int N = decltype(count)::value;
    Vec<T> total[C][N][M];
    unrolled<C>([&](auto c) FASTLSTM_INLINE_LAMBDA { clear(total[c]); });
    const int64_t row = gate * in.hidden + unit + l;
    dot_rows<T>(x, in.input, w_ih + row * in.input, total);
    dot_rows<T>(h, in.output, w_hh + row * in.output, total);
    for_sums<N, M>([&](auto r, auto m) FASTLSTM_INLINE_LAMBDA {
      Vec<T> sum = total[0][r][m];
      unrolled<C - 1>([&](auto c) FASTLSTM_INLINE_LAMBDA { sum += total[c + 1][r][m]; });
      sums[m][l + r] = sum;
    });
  };
  int64_t l = 0;
  for (; l + R <= width; l += R) add(Int<R>(), l);
  if constexpr (R > 1)
    for (; l < width; ++l) add(Int<1>(), l);
  for (; l < VL; ++l)
    for (int m = 0; m < M; ++m) sums[m][l] = Vec<T>{};
  for (int m = 0; m < M; ++m)
    z[m] = sum_each<T>(sums[m]) + part.get(in.start.at(0, n + m) + unit + gate * in.hidden);
}

// Panels whose weights are read before their cells are computed: long runs through memory, and
// cells side by side.
constexpr int64_t kDirectPanels = 4;

template <class T, class S>
FASTLSTM_INLINE void step_along_rows(const StepForward<T>& in, const S* w_ih, const S* w_hh,
                                     int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
  constexpr int VL = lanes<T>(), R = VL < 4 ? VL : 4;
  const int64_t H = in.hidden;
  const int64_t most = n1 - n0 > kTileRows ? 1 : kDirectPanels;  // more tiles: the weights in L2
  for_panels(in.step, 0, (p1 - p0 + most - 1) / most, [&](int64_t group, int64_t) {
    const int64_t first = p0 + group * most;
    const int64_t count = p1 - first < most ? p1 - first : most;
    for_tiles(n0, n1, [&](int64_t n, auto rows) {
      constexpr int M = decltype(rows)::value;
      const T *x[M], *h[M];
      for (int m = 0; m < M; ++m) {
        x[m] = in.x.at(0, n + m);
        h[m] = in.h_prev.at(0, n + m);
      }
      Vec<T> z[4][kDirectPanels][M];
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t p = 0; p < count; ++p) {
          const int64_t unit = (first + p) * VL;
          const int64_t width = H - unit < VL ? H - unit : VL;
          with_lanes<T>(H - unit, [&](auto part) {
            const auto dot = [&](auto at_once) {
              dot_units<decltype(at_once)::value>(in, w_ih, w_hh, x, h, n, gate, unit, width, part,
                                                  z[gate][p]);
            };
            if (M == 1 && in.row_by_row)
              dot(Int<1>());
            else
              dot(Int<R>());
          });
        }
      for (int64_t p = 0; p < count; ++p)
        with_lanes<T>(H - (first + p) * VL, [&](auto part) {
          for (int m = 0; m < M; ++m) {
            const Vec<T> one[1][4] = {{z[0][p][m], z[1][p][m], z[2][p][m], z[3][p][m]}};
            cells_forward<T, 1>(in, n + m, (first + p) * VL, one, part);
          }
        });
    });
  });
}

// The same step on weights as they are, along their rows: for so few rows of x that packing the
// weights would cost more than it saves.
template <class T>
void step_forward_direct(const StepForward<T>& in, int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
  with_elements(in.w_ih, [&](auto* w_ih) {
    step_along_rows(in, w_ih, static_cast<decltype(w_ih)>(in.w_hh.data), n0, n1, p0, p1);
  });
}

// Vectors of batch rows side by side, and units whose gates they take at a time: sums, broadcasts
// and a vector fit the registers.
constexpr int kAcrossVectors = kTileRows > kPanelVectors ? kPanelVectors : 2;
template <int V>
constexpr int kAcrossUnits = V == 1 || (V < 4 && kTileRows > 4) ? 2 : 1;
constexpr int64_t kAcrossRows = 4 * 2;  // of W at a time, at most

template <class T>
int64_t across_size(int64_t depth) {
  return (kAcrossVectors * lanes<T>() + kAcrossRows) * depth;
}

// A row of w, widened to `buffer` where its elements are halves.
template <class T>
FASTLSTM_INLINE const T* full_row(const Matrix<T>& w, int64_t row, int64_t depth,
                                  [[maybe_unused]] T* buffer) {
  if constexpr (sizeof(T) == sizeof(float))
    if (w.element != Element::full) {
      widen<T>(static_cast<const Float16*>(w.data) + row * depth, w.element, depth, buffer);
      return buffer;
    }
  return w.full() + row * depth;
}

// z^T = W [x h]^T for `count` rows of the batch, V vectors of them: x and h are turned once, c
// before the cells of a panel of units, and what comes of these after.
template <class T, int V>
void across(const StepForward<T>& in, int64_t n, int64_t count, int64_t p0, int64_t p1) {
  constexpr int VL = lanes<T>();
  constexpr int64_t row = V * VL;
  const int64_t H = in.hidden;
  T* const x = in.scratch;
  T* const h = x + in.input * row;
  T* const buffer = h + in.output * row;
  const auto turn = [&](Rows<const T> from, int64_t first, int64_t columns, T* to) {
    for (int64_t v = 0; v < row; v += VL)
      transpose_strip<T>(from.at(0, n + v) + first, from.step_n, count - v, columns, to + v, row,
                         VL);
  };
  turn(in.x, 0, in.input, x);
  turn(in.h_prev, 0, in.output, h);
  for_panels(in.step, p0, p1, [&](int64_t p, int64_t) {
    const int64_t first = p * VL, units = H - first < VL ? H - first : VL;
    T c[VL][row], out[VL][row], gates[VL][4][row];
    turn(in.c_prev, first, units, c[0]);
    StepForward<T> turned{};  // row n of it is a unit
    turned.hidden = row;
    turned.c = {c[0], 0, row};
    turned.c_prev = turned.c;
    turned.h = {out[0], 0, row};
    if (in.gates.data || in.half_gates.data) turned.gates = {gates[0][0], 0, 4 * row};
    turned.as_distances = in.as_distances;
    const auto some = [&](auto many, int64_t u) FASTLSTM_INLINE_LAMBDA {
      constexpr int R = decltype(many)::value, M = 4 * R;
      const auto row_of = [&](int gate, int64_t unit) { return gate * H + first + unit; };
      Vec<T> sums[M][V], z[M][V];
      clear(sums);
      const auto add = [&](const Matrix<T>& w, int64_t depth, const T* b) FASTLSTM_INLINE_LAMBDA {
        const T* a[M];
        for (int m = 0; m < M; ++m)
          a[m] = full_row(w, row_of(m / R, u + m % R), depth, buffer + m * depth);
        // In four turns, about the next rows of one gate each.
        const int64_t later = row_of(int(u / R % 4), (u / M + 1) * M) * depth * w.element_size();
        const auto* ahead = static_cast<const char*>(w.data) + later;
        multiply<T, M, V>(a, depth, b, row, reinterpret_cast<const T*>(ahead), sums);
      };
      add(in.w_hh, in.output, h);
      for_sums<M, V>([&](auto m, auto v) FASTLSTM_INLINE_LAMBDA {
        sums[m][v] += broadcast(in.start.data[row_of(m / R, u + m % R)]);
      });
      add(in.w_ih, in.input, x);
      copy(sums, z);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          const Vec<T> one[1][4] = {{z[r][v], z[R + r][v], z[2 * R + r][v], z[3 * R + r][v]}};
          cells_forward<T, 1>(turned, u + r, v * VL, one, AllLanes());
        }
    };
    constexpr int R = kAcrossUnits<V>;
    int64_t u = 0;
    for (; u + R <= units; u += R) some(Int<R>(), u);
    for (; u < units; ++u) some(Int<1>(), u);
    const auto turn_back = [&](const T* from, int64_t step, auto to, int64_t column) {
      transpose_strip<T>(from, step, units, count, to.at(0, n) + first + column, to.step_n, units);
    };
    turn_back(c[0], row, in.c, 0);
    turn_back(out[0], row, in.h, 0);
    for (int64_t gate = 0; gate < 4; ++gate) {
      if (in.gates.data) turn_back(gates[0][gate], 4 * row, in.gates, gate * H);
      if constexpr (sizeof(T) == sizeof(float))
        if (in.half_gates.data) turn_back(gates[0][gate], 4 * row, in.half_gates, gate * H);
    }
  });
}

// The same step on weights as they are, with the batch across the lanes and the rows of W as the
// left-hand matrix of the product: for a batch that fills them.
template <class T>
void step_forward_across(const StepForward<T>& in, int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
  constexpr int VL = lanes<T>(), kMost = kAcrossVectors * VL;
  int64_t parts = (n1 - n0 + kMost - 1) / kMost;
  for (int64_t n = n0; parts > 0; --parts) {
    const int64_t left = n1 - n, vectors = ((left + VL - 1) / VL + parts - 1) / parts;
    with_int<kAcrossVectors>(vectors, [&](auto v) {
      constexpr int V = decltype(v)::value;
      across<T, V>(in, n, left < V * VL ? left : V * VL, p0, p1);
    });
    n += vectors * VL;
  }
}

// ---- the step backward --------------------------------------------------------------------------

// dz and dc of one vector of units of batch row n, from dh = dL/dh_t.
template <class T, class L>
FASTLSTM_INLINE void cell_backward(const StepBackward<T>& in, int64_t n, int64_t unit, Vec<T> dh,
                                   L part) {
  const int64_t H = in.hidden;
  const T one = 1;
  const auto gate = [&](int64_t k) {
    if constexpr (sizeof(T) == sizeof(float))
      if (in.half_gates.data) {
        const Vec<T> kept = part.get(in.half_gates.at(0, n) + unit + k * H);
        return k == 2 ? kept : sigmoid_at(kept);
      }
    return part.get(in.gates.at(0, n) + unit + k * H);
  };
  const Vec<T> i = gate(0), f = gate(1), g = gate(2), o = gate(3);
  const Vec<T> tanh_c = tanh<T>(part.get(in.c.at(0, n) + unit));
  T* carried = in.dc.at(0, n) + unit;
  const Vec<T> dc = fma(dh * o, one - tanh_c * tanh_c, part.get((const T*)carried));
  T* dz = in.dz.at(0, n) + unit;
  part.put(dz, dc * g * (i * (one - i)));
  part.put(dz + H, dc * part.get(in.c_prev.at(0, n) + unit) * (f * (one - f)));
  part.put(dz + 2 * H, dc * i * (one - g * g));
  part.put(dz + 3 * H, dh * tanh_c * (o * (one - o)));
  part.put(carried, dc * f);
}

template <class T>
void step_backward(const StepBackward<T>& in, int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
  constexpr int VL = lanes<T>();
  const int64_t H = in.hidden;
  const bool far = from_afar(p1 - p0, in.depth);
  const bool chained = in.next.data && by_chains(in.depth, n1 - n0);
  for_panels(in.step, p0, p1, [&](int64_t p, int64_t next) {
    if (!far) next = -1;
    const int64_t first = p * kPanelVectors * VL;
    const int64_t vectors = (H - first + VL - 1) / VL;
    with_int<kPanelVectors>(vectors, [&](auto count) {
      constexpr int V = decltype(count)::value;
      with_lanes<T>(H - first - (V - 1) * VL, [&](auto last) {
        const T* const after = next < 0 ? nullptr : in.w.at(next);
        // What comes after the product comes from afar, from another program's data if the last
        // level is shared; its loads cannot begin before the product ends.
        const auto ask_for = [&](int64_t n) {
          for (int64_t unit = first; unit < first + V * VL; unit += kLine<T>) {
            const auto ask = [&](Rows<const T> from, int64_t place) {
              __builtin_prefetch(from.at(0, n) + place, 0, kNear);
            };
            if (in.grad_y.data) ask(in.grad_y, unit);
            if (in.gates.data)
              for (int gate = 0; gate < 4; ++gate) ask(in.gates, gate * H + unit);
            ask(in.c_prev, unit);
          }
        };
        // `given` has the sums of the first of these rows, if there already.
        const auto tile = [&](auto to_edge, int64_t n, auto rows,
                              const T* given) FASTLSTM_INLINE_LAMBDA {
          constexpr int M = decltype(rows)::value;
          Vec<T> sums[M][V], dh[M][V];
          clear(sums);
          const auto add = [&](Rows<const T> grad) {
            for (int r = 0; r < M; ++r) {
              const T* from = grad.at(0, n + r) + first;
              for (int v = 0; v < V - 1; ++v) dh[r][v] += load(from + v * VL);
              dh[r][V - 1] += last.get(from + (V - 1) * VL);
            }
          };
          if (given) {
            for_sums<M, V>([&](auto r, auto v) FASTLSTM_INLINE_LAMBDA {
              sums[r][v] = load(given + (r * V + v) * VL);
            });
          } else if (in.next.data) {
            for (int r = 0; r < M; ++r) ask_for(n + r);
            const T* a[M];
            for (int r = 0; r < M; ++r) a[r] = in.next.at(0, n + r);
            const T* ahead = next_part(after, n - n0, in.depth);
            if constexpr (to_edge)
              multiply_to_edge<T, M, V>(a, in.depth, in.w, p, ahead, sums);
            else
              multiply<T, M, V>(a, in.depth, in.w.at(p), in.w.step(p), ahead, sums);
          }
          copy(sums, dh);
          if (in.grad_y.data) add(in.grad_y);
          if (in.grad_h.data) add(in.grad_h);
          for (int r = 0; r < M; ++r) {
            for (int v = 0; v < V - 1; ++v)
              cell_backward<T>(in, n + r, first + v * VL, dh[r][v], AllLanes());
            cell_backward<T>(in, n + r, first + (V - 1) * VL, dh[r][V - 1], last);
          }
        };
        if constexpr (V == kPanelVectors)
          if (chained && !in.w.has_edge(p))
            return with_panel_sums<T>(n0, n1, [&](int64_t from, int64_t past, PanelSums<T> z) {
              multiply_by_chains<T>(in.next, from, past, in.depth, in.w.at(p), in.w.step(p), after,
                                    z);
              for_tiles(from, past, [&](int64_t n, auto rows) {
                for (int64_t ask = n + rows; ask < past && ask < n + 2 * rows; ++ask) ask_for(ask);
                tile(Int<0>(), n, rows, z[n - from]);
              });
            });
        if (in.w.has_edge(p))
          for_tiles(n0, n1, [&](int64_t n, auto rows) { tile(Int<1>(), n, rows, nullptr); });
        else
          for_tiles(n0, n1, [&](int64_t n, auto rows) { tile(Int<0>(), n, rows, nullptr); });
      });
    });
  });
}

// ---- for tests and benchmarks -------------------------------------------------------------------

template <class T>
void map(Function function, const T* x, T* y, int64_t count) {
  for (int64_t k = 0; k < count; k += lanes<T>())
    with_lanes<T>(count - k, [&](auto part) {
      const Vec<T> v = part.get(x + k);
      part.put(y + k, function == Function::exp       ? exp<T>(v)
                      : function == Function::sigmoid ? sigmoid<T>(v)
                                                      : tanh<T>(v));
    });
}

template <class T>
double fma_loop(int64_t count) {
  constexpr int kChains = 12;  // two units, latency 4 to 5, and registers to spare on every ISA
  volatile T half = T(0.5);    // unknown to the compiler, so the loop stays
  const Vec<T> a = broadcast(T(half)), b = broadcast(T(half));
  Vec<T> sums[kChains], total{};
  unrolled<kChains>([&](auto c) FASTLSTM_INLINE_LAMBDA { sums[c] = broadcast(T(c)); });
  for (int64_t k = 0; k < count; ++k)
    unrolled<kChains>([&](auto c) FASTLSTM_INLINE_LAMBDA { sums[c] = fma(sums[c], a, b); });
  unrolled<kChains>([&](auto c) FASTLSTM_INLINE_LAMBDA { total += sums[c]; });
  volatile T kept = sum<T>(total);
  (void)kept;
  return 2.0 * kChains * lanes<T>() * double(count);
}

// Whether f sets bits for one of these numbers.
template <class T, class S, class F>
FASTLSTM_INLINE bool any_of(const S* x, int64_t count, F&& f) {
  constexpr int VL = lanes<T>();
  Bits<T> found = {};
  int64_t i = 0;
  for (; i + VL <= count; i += VL) found |= f(Vec<T>(load(x + i)));
  if (i < count) found |= f(Vec<T>(load(x + i, count - i)));
  return any(found);
}

template <class T>
bool has_nan(const T* x, int64_t count) {
  return x && any_of<T>(x, count, [](Vec<T> v) { return v != v; });
}

template <class T>
bool finite(Matrix<T> matrix, int64_t first, int64_t count) {
  bool found = false;
  with_elements(matrix, [&](auto* w) {
    found = any_of<T>(w + first, count, [](Vec<T> v) { return (Bits<T>)(v - v); });
  });
  return !found;
}

template <class T>
constexpr Kernels<T> table() {
  Kernels<T> kernels{};
  kernels.lanes = lanes<T>();
  kernels.panel_row = kPanelVectors * kernels.lanes;
  kernels.panel_depth = 1;
  kernels.narrow_end = true;
  kernels.panel_cycles = kPanelVectors / 2.0;  // two fused multiply-adds a cycle
  kernels.tall_tiles = kTileRows > 4;
  kernels.tile_rows = 1;
  // Of 512 rows dW was faster than of 256, and of 1024 no faster (benchmarks/NOTES.md).
  kernels.strip_rows = 96;
  kernels.strip_depth = 512;
  kernels.strip_size = kernels.strip_rows * kernels.strip_depth;
  kernels.scratch_size = [](int64_t, int64_t) { return int64_t(0); };
  kernels.across_size = across_size<T>;
  kernels.pack_gates = pack_gates<T>;
  kernels.pack_rows = pack_rows<T>;
  kernels.pack_matrix = pack_matrix<T>;
  kernels.pack_columns = pack_columns<T>;
  kernels.transpose = transpose<T>;
  kernels.sum_rows = sum_rows<T>;
  kernels.outer = outer<T>;
  kernels.product = product<T>;
  kernels.step_forward = step_forward<T>;
  kernels.step_forward_direct = step_forward_direct<T>;
  kernels.step_forward_across = step_forward_across<T>;
  kernels.step_backward = step_backward<T>;
  kernels.widen = widen<T>;
  kernels.narrow = narrow<T>;
  kernels.has_nan = has_nan<T>;
  kernels.finite = finite<T>;
  kernels.map = map<T>;
  kernels.fma_loop = fma_loop<T>;
  return kernels;
}

}  // namespace

extern const Kernels<float> kernels_f32 = table<float>();
extern const Kernels<double> kernels_f64 = table<double>();

}  // namespace FASTLSTM_ISA
}  // namespace fastlstm
