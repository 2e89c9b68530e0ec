// Products of bfloat16 numbers, for x86-64 CPUs that have instructions for them: of AMX tiles, or
// of AVX-512 (dots). Included after kernels.inl, whose cells and transposes it shares.
//
// A tile product adds A (16, 32) B (32, 16) of bfloat16 to C (16, 16) of float, with the sums in
// float. A number goes in as a sum of bfloat16 terms: see Bf16, Floats and Dots.
//
// A panel is, for each k-step of 32 and each of its vectors, a tile of B for each term: 16 rows,
// each of 16 columns of two neighbouring k. Rows of A are cut into tiles of nearly equal height;
// the tiles of all k-steps of a row tile follow each other. The terms of a tile stand side by side.

namespace fastlstm {
namespace FASTLSTM_ISA {
namespace {

constexpr int64_t kSide = 16;         // most rows of a tile, and its columns
constexpr int64_t kDepthOfTile = 32;  // k of one tile product
constexpr int64_t kTileSize = 256;    // floats of the memory of a tile
constexpr int64_t kPairRow = kSide;   // floats of the memory of one row of a tile of B
// Rows of A that a thread holds as terms: so many that the weights, which come from afar, are used
// often; the terms themselves stay in L2.
constexpr int64_t kTermsSize = 256 << 10;
constexpr int64_t kFewestRows = 2 * kSide;

// How many terms there are of numbers given (the weights, x, what training keeps) and of those
// computed (h, dz).
// Where those given are bfloat16; two terms of a float leave an error of at most 2^-16 of it.
struct Bf16 {
  static constexpr int kGiven = 1, kComputed = 2;
  static constexpr int64_t kChain = 0;  // sums go on to the end
  static constexpr int64_t kStripDepth = 320;
  static constexpr double kCycles = 0.25;  // `panel_cycles`
};
// Any floats: three terms are all of a float but for what is denormal.
struct Floats {
  static constexpr int kGiven = 3, kComputed = 3;
  static constexpr int64_t kChain = 16;  // most k-steps of a sum, each of which rounds six times
  static constexpr int64_t kStripDepth = 512;
  static constexpr double kCycles = 1.25;
};
// As Bf16, but on vectors: a product takes as long as one of floats and is of two k. With two terms
// of what is computed it would be no faster than floats, so that is rounded to bfloat16, as torch
// does.
struct Dots {
  static constexpr int kGiven = 1, kComputed = 1;
  static constexpr int64_t kChain = 0;
  static constexpr int64_t kStripDepth = 512;
  static constexpr double kCycles = 1;
};
template <class Numbers>
constexpr bool kOnTiles = true;
template <>
constexpr bool kOnTiles<Dots> = false;
template <class Numbers>
constexpr int64_t kTileOf = Numbers::kGiven * kTileSize;  // floats of a tile of B, all its terms

// In a k-step of a panel, floats from vector to vector and from pair of k to pair. For dots the
// pairs follow each other, as they are read.
template <class Numbers>
constexpr int64_t kVectorStep = kOnTiles<Numbers> ? kTileOf<Numbers> : kPairRow;
template <class Numbers>
FASTLSTM_INLINE int64_t pair_step(int64_t vectors) {
  return kOnTiles<Numbers> ? kPairRow : vectors * kPairRow;
}

FASTLSTM_INLINE int64_t k_steps(int64_t depth) { return (depth + kDepthOfTile - 1) / kDepthOfTile; }

// ---- instructions -------------------------------------------------------------------------------

// The memory of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

#ifdef FASTLSTM_EMULATE_TILES
#include "tiles_emulated.h"
#else
// Not the compiler's intrinsics, which take no template argument for a tile.

FASTLSTM_INLINE void configure_tiles(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
FASTLSTM_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }
template <int Tile>
FASTLSTM_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
// `step` floats from row to row.
template <int Tile>
FASTLSTM_INLINE void tile_load(const float* from, int64_t step = kSide) {
  __asm__ volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(from), "r"(step), "i"(Tile) : "memory");
}
template <int Tile>
FASTLSTM_INLINE void tile_store(float* to, int64_t step = kSide) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(to), "r"(step), "i"(Tile) : "memory");
}
// Where another thread shares the core, products alone take twice as long as with other
// instructions between them, and neither overlap with loads.
template <int C, int A, int B>
FASTLSTM_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0\n\t.rept 8\n\tnop\n\t.endr" ::"i"(C),
                   "i"(A), "i"(B));
}

// To each sum of floats the products of two neighbouring k. In assembly, since the compiler is to
// use such instructions nowhere else in this file.
FASTLSTM_INLINE void add_dots(Vec<float>& sums, Vec<float> a, Vec<float> b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}
#endif

// Tiles 0 to 3 are sums, 4 and 5 hold A, 6 and 7 B.
constexpr int kTileA = 4, kTileB = 6;

// The shape of the tiles while it lives: `height` rows of A and of C.
class TileShape {
 public:
  explicit TileShape(int64_t height) {
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = uint8_t(tile < kTileB ? height : kSide);
    }
    configure_tiles(config);
  }
  ~TileShape() { release_tiles(); }
  TileShape(const TileShape&) = delete;
  TileShape& operator=(const TileShape&) = delete;
};

// ---- rows of A as terms -------------------------------------------------------------------------

constexpr int32_t kUpper = -0x10000;  // the half of a float that is bfloat16

// The upper halves of 32 floats, which are bfloat16: 16 words of two.
FASTLSTM_INLINE Vec<float> upper_halves(Vec<float> low, Vec<float> high) {
  const Bits<float> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto every_second = [&](int from) {
    return (Bits<float>)_mm512_permutex2var_ps(low, (__m512i)(2 * lane + from), high);
  };
  return (Vec<float>)((every_second(0) >> 16 & 0xffff) | (every_second(1) & kUpper));
}

// The floats whose upper halves are the terms of v: its own upper half, that of what is left,
// rounded, and, in a third, all that is left then. An infinity or NaN has no second and third. A
// single term is v rounded to nearest, ties to even.
template <int Terms>
struct Split {
  Vec<float> term[Terms];
  FASTLSTM_INLINE explicit Split(Vec<float> v) {
    term[0] = Terms > 1 ? v : (Vec<float>)rounded_to_bfloat16(v);
    if constexpr (Terms > 1) {
      const __m512i twice = _mm512_add_epi32((__m512i)v, (__m512i)v);  // without the sign
      const __mmask16 finite =
          _mm512_cmplt_epu32_mask(twice, _mm512_set1_epi32(int32_t(0xff000000)));
      const Vec<float> rest = _mm512_maskz_sub_ps(finite, v, upper(v));
      term[1] = (Vec<float>)((Bits<float>)rest + 0x8000);
      if constexpr (Terms > 2) term[2] = rest - upper(term[1]);
    }
  }

 private:
  static FASTLSTM_INLINE Vec<float> upper(Vec<float> v) {
    return (Vec<float>)((Bits<float>)v & kUpper);
  }
};

// The upper halves of `low` and of `high`, lane by lane, as words of two.
FASTLSTM_INLINE Vec<float> words_of(Vec<float> low, Vec<float> high) {
  return (Vec<float>)(((Bits<float>)low >> 16 & 0xffff) | ((Bits<float>)high & kUpper));
}

template <class S>
FASTLSTM_INLINE Vec<float> load_some(const S* from, int64_t left) {
  return left >= kSide ? load(from) : left > 0 ? load(from, left) : Vec<float>{};
}

// How `count` rows of A are cut into tiles.
struct RowTiles {
  int64_t count, tiles, height;
  explicit RowTiles(int64_t count)
      : count(count), tiles((count + kSide - 1) / kSide), height((count + tiles - 1) / tiles) {}
  // Of the height that `transpose_terms` writes.
  static RowTiles of_strip(int64_t count) {
    RowTiles rows(count);
    rows.height = kSide;
    return rows;
  }
};

// A as it is multiplied: Terms tiles for each k-step.
template <int Terms>
struct Left {
  const float* data;
  int64_t depth, steps;
  Left(const float* data, int64_t depth) : data(data), depth(depth), steps(k_steps(depth)) {}
  const float* tile(int64_t t) const { return data + t * steps * Terms * kTileSize; }
};

// Writes rows row(0), row(1), ... of `depth` floats to `out` as terms.
template <int Terms, class Row>
FASTLSTM_INLINE Left<Terms> split(const RowTiles& rows, int64_t depth, float* out, Row&& row) {
  const int64_t steps = k_steps(depth);
  for (int64_t m = 0; m < rows.count; ++m) {
    const float* from = row(m);
    float* to = out + m / rows.height * steps * Terms * kTileSize + m % rows.height * kPairRow;
    const auto put = [&](Vec<float> low, Vec<float> high) {
      const Split<Terms> first(low), second(high);
      for (int i = 0; i < Terms; ++i, to += kTileSize)
        store(to, upper_halves(first.term[i], second.term[i]));
    };
    int64_t k = 0;
    for (; k + kDepthOfTile <= depth; k += kDepthOfTile)
      put(load(from + k), load(from + k + kSide));
    if (k < depth)
      put(load_some(from + k, depth - k), load_some(from + k + kSide, depth - k - kSide));
  }
  return {out, depth};
}

// The transposed columns m0 <= m < m1 of `count` rows, as terms: `out` is what Left has for their
// products.
template <class Numbers>
void transpose_terms(Rows<const float> a, int64_t count, int64_t m0, int64_t m1, float* out,
                     int64_t) {
  constexpr int Terms = Numbers::kComputed;
  for (int64_t m = m0; m < m1; m += kSide)
    for (int64_t k = 0; k < count; k += kDepthOfTile) {
      Vec<float> block[Terms][kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const auto row = [&](int64_t k) {
          return Split<Terms>(k < count ? load_some(a.row(k) + m, m1 - m) : Vec<float>{});
        };
        const auto even = row(k + 2 * i), odd = row(k + 2 * i + 1);
        for (int t = 0; t < Terms; ++t) block[t][i] = words_of(even.term[t], odd.term[t]);
      }
      for (int t = 0; t < Terms; ++t, out += kTileSize) {
        transpose_block<float>(block[t]);
        for (int64_t i = 0; i < kSide; ++i) store(out + i * kPairRow, block[t][i]);
      }
    }
}

template <class Numbers>
void sum_rows_of_terms(const float* a, int64_t, int64_t rows, int64_t columns, float* out,
                       bool accumulate) {
  const int64_t tiles = Numbers::kComputed * k_steps(columns);  // of a row tile
  for (int64_t m = 0; m < rows; m += kSide, a += tiles * kTileSize) {
    Vec<float> total[kSide] = {};
    for (int64_t i = 0; i < tiles; ++i)
      for (int64_t r = 0; r < kSide; ++r) {
        const Bits<float> words = (Bits<float>)load(a + i * kTileSize + r * kPairRow);
        total[r] += (Vec<float>)(words << 16) + (Vec<float>)(words & kUpper);
      }
    const int64_t count = rows - m < kSide ? rows - m : kSide;
    Vec<float> sums = sum_each<float>(total);
    if (accumulate) sums += load(out + m, count);
    store(out + m, sums, count);
  }
}

// ---- the tile product ---------------------------------------------------------------------------

// Which terms of A and of B, from 0, are multiplied; the products left out are less than a float
// keeps. Two that follow each other share a term, which need not be loaded again.
struct Pair {
  int a, b;
};
template <int OfA, int OfB>
constexpr Pair kPairs[] = {{1, 0}, {0, 0}};  // two terms and one
template <>
constexpr Pair kPairs<1, 1>[] = {{0, 0}};
template <>
constexpr Pair kPairs<3, 3>[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};

// f(Int<0>()), f(Int<1>()), ...
template <int End, int I = 0, class F>
FASTLSTM_INLINE void for_each_int(F&& f) {
  if constexpr (I < End) {
    f(Int<I>());
    for_each_int<End, I + 1>(f);
  }
}

// Sums of one or two tiles of rows: [row tile][row][vector of a panel][column].
constexpr int64_t kSumsRow = kPanelVectors * kSide;
struct alignas(64) Sums {
  float of[2][kSide][kPanelVectors][kSide];
};

// Where the sums of one or two tiles of `height` rows and the vectors of a panel stand: floats from
// row to row, from vector to vector, from tile to tile.
struct Place {
  float* data;
  int64_t row, vector, tile, height;
  Place(Sums* sums, int64_t height)
      : data(&sums->of[0][0][0][0]),
        row(kSumsRow),
        vector(kSide),
        tile(kSide * kSumsRow),
        height(height) {}
  Place(float* data, int64_t row, int64_t vector, int64_t height)
      : data(data), row(row), vector(vector), tile(height * row), height(height) {}
};

// Adds A B to the sums of M tiles of rows by W tiles of columns, in the same order whatever M and
// W. `b` is the first of W neighbours among the tiles that a k-step has for so many vectors.
// Of the k-steps from `s` to `past`; between() comes after each.
template <class Numbers, int M, int W, int Terms, class Between>
FASTLSTM_INLINE void add_tiles(const Left<Terms>& left, int64_t t, const float* b, int64_t vectors,
                               int64_t s, int64_t past, Between&& between) {
  constexpr int OfB = Numbers::kGiven;
  constexpr int count = sizeof(kPairs<Terms, OfB>) / sizeof(Pair);
  const float* a[M];
  for (int m = 0; m < M; ++m) a[m] = left.tile(t + m) + s * Terms * kTileSize;
  b += s * vectors * OfB * kTileSize;
  for (; s < past; ++s, b += vectors * OfB * kTileSize) {
    for_each_int<count>([&](auto index) {
      constexpr int k = decltype(index)::value, before = k ? k - 1 : 0;
      constexpr int term_a = kPairs<Terms, OfB>[k].a, term_b = kPairs<Terms, OfB>[k].b;
      constexpr bool new_a = k == 0 || term_a != kPairs<Terms, OfB>[before].a;
      constexpr bool new_b = k == 0 || term_b != kPairs<Terms, OfB>[before].b || W > 2;
      if constexpr (new_a)
        for_each_int<M>([&](auto row) {
          constexpr int m = decltype(row)::value;
          tile_load<kTileA + m>(a[m] + term_a * kTileSize);
        });
      // All loads before the products; columns two by two, as many as there are tiles for B.
      for_each_int<(W + 1) / 2>([&](auto half) {
        constexpr int first = 2 * decltype(half)::value, wide = W - first < 2 ? 1 : 2;
        if constexpr (new_b)
          for_each_int<wide>([&](auto column) {
            constexpr int v = decltype(column)::value;
            tile_load<kTileB + v>(b + ((first + v) * OfB + term_b) * kTileSize);
          });
        for_each_int<M>([&](auto row) {
          constexpr int m = decltype(row)::value;
          for_each_int<wide>([&](auto column) {
            constexpr int v = decltype(column)::value;
            tile_multiply<M * m + first + v, kTileA + m, kTileB + v>();
          });
        });
      });
    });
    for (int m = 0; m < M; ++m) a[m] += Terms * kTileSize;
    between();
  }
}

// The sum of so many k-steps is cut into chains: of the steps from steps * c / chains on.
template <class Numbers>
FASTLSTM_INLINE int64_t chains_of(int64_t steps) {
  return Numbers::kChain ? (steps + Numbers::kChain - 1) / Numbers::kChain : 1;
}

// What add(Int<M>(), first vector, Int<W>(), first k-step, past the last) adds over so many k-steps
// to the sums of M row tiles and of W vectors from `first` on, which begin with what is there or,
// if `fresh`, with zeros.
template <class Numbers, int M, int W, class Add>
FASTLSTM_INLINE void sum_tiles(int first, bool fresh, const Place& sums, int64_t steps, Add&& add) {
  constexpr int kWide = M == 2 ? 2 : 4;
  const auto each = [&](const Place& place, auto&& f) {
    for_each_int<M>([&](auto row) {
      for_each_int<W>([&](auto column) {
        constexpr int m = decltype(row)::value, v = decltype(column)::value;
        f(Int<kWide * m + v>(), place.data + m * place.tile + (first + v) * place.vector);
      });
    });
  };
  const auto store_to = [&](const Place& place) {
    each(place, [&](auto tile, float* at) { tile_store<decltype(tile)::value>(at, place.row); });
  };
  const int64_t chains = chains_of<Numbers>(steps);
  for (int64_t c = 0; c < chains; ++c) {
    each(sums, [&](auto tile, float* at) {
      if (fresh || c > 0)
        tile_zero<decltype(tile)::value>();
      else
        tile_load<decltype(tile)::value>(at, sums.row);
    });
    add(Int<M>(), first, Int<W>(), steps * c / chains, steps * (c + 1) / chains);
    if (c == 0) {
      store_to(sums);
      continue;
    }
    Sums chain;
    store_to(Place(&chain, sums.height));
    for (int m = 0; m < M; ++m)
      for (int v = first; v < first + W; ++v)
        for (int64_t r = 0; r < sums.height; ++r) {
          float* const at = sums.data + m * sums.tile + v * sums.vector + r * sums.row;
          store(at, load((const float*)at) + load((const float*)chain.of[m][r][v]));
        }
  }
}

// The same of V vectors and of row tiles from t on, two if there are.
template <class Numbers, int V, class Add>
FASTLSTM_INLINE void sum_rows_at(const RowTiles& rows, int64_t t, bool fresh, const Place& sums,
                                 int64_t steps, Add&& add) {
  if (t + 1 < rows.tiles) {
    sum_tiles<Numbers, 2, V == 1 ? 1 : 2>(0, fresh, sums, steps, add);
    if constexpr (V > 2) sum_tiles<Numbers, 2, V - 2>(2, fresh, sums, steps, add);
  } else {
    sum_tiles<Numbers, 1, V>(0, fresh, sums, steps, add);
  }
}

// What is to be done with sums, R rows at a time: f(panel, first row, sums of its vectors,
// kSide apart, Int<rows>). It is done while the tiles multiply for the next sums, which leaves
// the vector units free.
template <int R, class F>
class Rest {
 public:
  // A product has so many k-steps; two row tiles take it twice, for two vectors each.
  Rest(const RowTiles& rows, int64_t steps, F f) : f_(f), rows_(rows) {
    const int64_t rounds = rows.tiles > 1 ? 2 * steps : steps;
    const int64_t all = rows.tiles > 1 ? 2 * rows.height : rows.count;
    each_ = (all + rounds - 1) / rounds;
  }
  // Memory for the next sums, and then what they are of.
  Sums* next() { return &sums_[1 - current_]; }
  void are(int64_t panel, int64_t tile, int64_t tiles) {
    finish();
    current_ = 1 - current_;
    panel_ = panel;
    first_ = tile * rows_.height;
    const int64_t left = rows_.count - first_;
    done_ = 0;
    count_ = left < tiles * rows_.height ? left : tiles * rows_.height;
  }
  FASTLSTM_INLINE void some() {
    due_ += each_;
    for (; due_ >= R && done_ < count_; due_ -= R) next_rows();
  }
  void finish() {
    while (done_ < count_) next_rows();
    due_ = 0;
  }

 private:
  __attribute__((noinline)) void next_rows() {
    const int64_t tile = done_ >= rows_.height, row = done_ - tile * rows_.height;
    const int64_t past = tile || count_ < rows_.height ? count_ : rows_.height;
    with_int<R>(past - done_, [&](auto many) {
      f_(panel_, first_ + done_, sums_[current_].of[tile][row][0], many);
      done_ += decltype(many)::value;
    });
  }

  Sums sums_[2];
  F f_;
  const RowTiles rows_;
  int64_t each_, due_ = 0, panel_ = 0, first_ = 0, done_ = 0, count_ = 0;
  int current_ = 0;
};

// The sums of all row tiles, two at a time, with a panel of V vectors, and what `rest` does with
// them. add(first row tile, ...) adds to them as in sum_tiles().
template <class Numbers, int V, int R, class F, class Add>
FASTLSTM_INLINE void sum_rows_of(const RowTiles& rows, int64_t panel, int64_t steps,
                                 Rest<R, F>& rest, Add&& add) {
  for (int64_t t = 0; t < rows.tiles; t += 2) {
    sum_rows_at<Numbers, V>(rows, t, true, Place(rest.next(), rows.height), steps,
                            [&](auto... part) { add(t, part...); });
    rest.are(panel, t, t + 1 < rows.tiles ? 2 : 1);
  }
}

// ---- the same by dots ---------------------------------------------------------------------------

// A product of rows of A and a panel of B.
struct DotsOf {
  const Left<1>& left;
  const float* b;
};

// The sum of products, for the R rows from `row` on of row tile t and the W vectors of a panel; to
// memory as that of Sums. Never inlined: in some callers GCC would keep the sums in memory all
// along, which takes three times as long.
template <int R, int W, int Products>
__attribute__((noinline)) void sum_dots(const DotsOf (&products)[Products], int64_t t, int64_t row,
                                        float* to) {
  Vec<float> sums[R][W];
  clear(sums);
  for (const DotsOf& product : products) {
    const float* a = product.left.tile(t) + row * kPairRow;
    const float* b = product.b;
    for (int64_t pairs = (product.left.depth + 1) / 2; pairs > 0; pairs -= kSide) {
      const int64_t count = pairs < kSide ? pairs : kSide;
      for (int64_t i = 0; i < count; ++i, b += W * kPairRow) {
        Vec<float> of_b[W];
        unrolled<W>([&](auto w) FASTLSTM_INLINE_LAMBDA { of_b[w] = load(b + w * kPairRow); });
        unrolled<R>([&](auto r) FASTLSTM_INLINE_LAMBDA {
          const Vec<float> of_a = broadcast(a[r * kPairRow + i]);
          unrolled<W>([&](auto w) FASTLSTM_INLINE_LAMBDA { add_dots(sums[r][w], of_a, of_b[w]); });
        });
      }
      a += kTileSize;
    }
  }
  for_sums<R, W>([&](auto r, auto w)
                     FASTLSTM_INLINE_LAMBDA { store(to + r * kSumsRow + w * kSide, sums[r][w]); });
}

// The sums of all rows with a panel of W vectors, and what f, as in Rest, does with them.
template <int W, int Products, class F>
FASTLSTM_INLINE void sum_rows_by_dots(const DotsOf (&products)[Products], const RowTiles& rows,
                                      int64_t panel, F&& f) {
  alignas(64) float sums[kTileRows * kSumsRow];
  for (int64_t t = 0; t < rows.tiles; ++t) {
    const int64_t first = t * rows.height, left = rows.count - first;
    for_tiles(0, left < rows.height ? left : rows.height, [&](int64_t row, auto many) {
      sum_dots<decltype(many)::value, W>(products, t, row, sums);
      f(panel, first + row, sums, many);
    });
  }
}

// ---- parts of the rows --------------------------------------------------------------------------

// f(first row, rows) for parts of the rows m0 <= m < m1 whose terms, `terms` of bfloat16 for each
// row, have room in memory of terms_size().
int64_t rows_at_once(int64_t terms) {
  const int64_t rows = kTermsSize / (terms / 2) / kFewestRows * kFewestRows;
  return rows < kFewestRows ? kFewestRows : rows;
}
template <class Numbers>
int64_t terms_size(int64_t rows, int64_t depth) {
  const int64_t row = k_steps(depth) * kPairRow * Numbers::kComputed;
  const int64_t all = (rows + kSide - 1) / kSide * kSide * row;
  const int64_t most = kFewestRows * row < kTermsSize ? kTermsSize : kFewestRows * row;
  return all < most ? all : most;
}
template <class F>
FASTLSTM_INLINE void for_parts(int64_t m0, int64_t m1, int64_t terms, F&& f) {
  const int64_t most = rows_at_once(terms);
  for (int64_t m = m0; m < m1; m += most) f(m, RowTiles(m1 - m < most ? m1 - m : most));
}

// ---- pack ---------------------------------------------------------------------------------------

// The tiles, of each term one, of B = W^T: `columns` rows of W, from `w` on, and `depth` of their
// elements; `out_step` from pair of k to pair.
template <class Numbers, class S>
FASTLSTM_INLINE void pack_tiles(const S* w, int64_t step, int64_t columns, int64_t depth,
                                float* out, int64_t out_step) {
  constexpr int Terms = Numbers::kGiven;
  Vec<float> block[Terms][kSide];
  for (int64_t j = 0; j < kSide; ++j) {
    const bool here = j < columns;
    const Split<Terms> low(here ? load_some(w + j * step, depth) : Vec<float>{});
    const Split<Terms> high(here ? load_some(w + j * step + kSide, depth - kSide) : Vec<float>{});
    for (int t = 0; t < Terms; ++t) block[t][j] = upper_halves(low.term[t], high.term[t]);
  }
  for (int t = 0; t < Terms; ++t, out += kTileSize) {
    transpose_block<float>(block[t]);
    for (int64_t k = 0; k < kSide; ++k) store(out + k * out_step, block[t][k]);
  }
}

template <class Numbers>
bool pack_gates_as_terms(Matrix<float> matrix, int64_t hidden, int64_t depth, int64_t p0,
                         int64_t p1, Panels<float> to) {
  const int64_t steps = k_steps(depth);
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p) {
      float* out = const_cast<float*>(to.at(p));
      for (int64_t s = 0; s < steps; ++s, out += kPanelVectors * kTileOf<Numbers>)
        for (int64_t gate = 0; gate < kPanelVectors; ++gate)
          pack_tiles<Numbers>(w + (gate * hidden + p * kSide) * depth + s * kDepthOfTile, depth,
                              hidden - p * kSide, depth - s * kDepthOfTile,
                              out + gate * kVectorStep<Numbers>, pair_step<Numbers>(kPanelVectors));
    }
  });
  return false;
}

// The vectors of a panel, whose rows take half a float for each column and term.
template <class Numbers>
FASTLSTM_INLINE int64_t vectors_of(const Panels<float>& panels, int64_t p) {
  return panels.step(p) / (kSide / 2 * Numbers::kGiven);
}

template <class Numbers>
void pack_columns_as_terms(Matrix<float> matrix, int64_t depth, int64_t columns, int64_t p0,
                           int64_t p1, Panels<float> to) {
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t vectors = vectors_of<Numbers>(to, p);
      float* out = const_cast<float*>(to.at(p));
      for (int64_t s = 0; s < k_steps(depth); ++s, out += vectors * kTileOf<Numbers>)
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t first = (p * kPanelVectors + v) * kSide;
          pack_tiles<Numbers>(w + first * depth + s * kDepthOfTile, depth, columns - first,
                              depth - s * kDepthOfTile, out + v * kVectorStep<Numbers>,
                              pair_step<Numbers>(vectors));
        }
    }
  });
}

// Rows come one after the other, so an even one may clear the place of the odd one after it, and
// the last the rest of its k-step.
template <class Numbers, class S>
void pack_rows_as_terms(Rows<const S> b, int64_t k0, int64_t count, int64_t columns, int64_t p0,
                        int64_t p1, Panels<float> to) {
  const int64_t end = k0 + count, cleared = k_steps(end) * kDepthOfTile;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t vectors = vectors_of<Numbers>(to, p), first = p * kPanelVectors * kSide;
    for (int64_t k = k0; k < cleared;) {
      float* const out = const_cast<float*>(to.at(p)) +
                         k / kDepthOfTile * vectors * kTileOf<Numbers> +
                         k % kDepthOfTile / 2 * pair_step<Numbers>(vectors);
      const bool here = k < end, pair = k % 2 == 0 && k + 1 < end;
      const S* const row = here ? b.row(k - k0) + first : nullptr;
      const S* const after = pair ? b.row(k + 1 - k0) + first : nullptr;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t left = columns - first - v * kSide;
        const auto split = [&](const S* from) {
          return Split<Numbers::kGiven>(from ? load_some(from + v * kSide, left) : Vec<float>{});
        };
        const auto even = split(k % 2 ? nullptr : row), odd = split(k % 2 ? row : after);
        for (int t = 0; t < Numbers::kGiven; ++t) {
          float* const place = out + v * kVectorStep<Numbers> + t * kTileSize;
          const Vec<float> words = words_of(even.term[t], odd.term[t]);
          if (k % 2 == 0)
            store(place, words);
          else if (here)
            store(place, (Vec<float>)(((Bits<float>)load(place) & 0xffff) | (Bits<float>)words));
        }
      }
      k += pair ? 2 : 1;
    }
  }
}

template <class Numbers>
void pack_matrix_as_terms(Matrix<float> matrix, int64_t depth, int64_t columns, int64_t p0,
                          int64_t p1, Panels<float> to) {
  with_elements(matrix, [&](auto* w) {
    pack_rows_as_terms<Numbers>(rows_of(w, columns), 0, depth, columns, p0, p1, to);
  });
}

// ---- products and steps -------------------------------------------------------------------------

// The sums of all rows with panel p of B, and what f does with each.
template <class F>
FASTLSTM_INLINE void sum_panel_by_dots(const Left<1>& left, const RowTiles& rows,
                                       const Panels<float>& b, int64_t p, F&& f) {
  const DotsOf product[1] = {{left, b.at(p)}};
  with_int<kPanelVectors>(vectors_of<Dots>(b, p), [&](auto many) {
    sum_rows_by_dots<decltype(many)::value>(
        product, rows, p, [&](int64_t panel, int64_t row, const float* sums, auto some) {
          for (int r = 0; r < some; ++r) f(panel, row + r, sums + r * kSumsRow, Int<1>());
        });
  });
}

// The sums of all row tiles with panel p of B, and what `rest` does with them.
template <class Numbers, int Terms, int R, class F>
FASTLSTM_INLINE void sum_panel(const Left<Terms>& left, const RowTiles& rows,
                               const Panels<float>& b, int64_t p, Rest<R, F>& rest) {
  with_int<kPanelVectors>(vectors_of<Numbers>(b, p), [&](auto many) {
    constexpr int V = decltype(many)::value;
    sum_rows_of<Numbers, V>(
        rows, p, left.steps, rest,
        [&](int64_t t, auto tall, int v, auto wide, int64_t from, int64_t past) {
          add_tiles<Numbers, decltype(tall)::value, decltype(wide)::value>(
              left, t, b.at(p) + v * kTileOf<Numbers>, V, from, past, [&] { rest.some(); });
        });
  });
}

// A product whose sums are added to C: on tiles, while these multiply for the next ones.
template <class Numbers, int Terms>
void product_and_rest(const Left<Terms>& left, const RowTiles& rows, int64_t m,
                      const Product<float>& in, int64_t p0, int64_t p1) {
  const auto [count, gates] = in.columns;
  const auto put = [&, count = count, gates = gates](int64_t p, int64_t row, const float* sums,
                                                     Int<1>) {
    float* const c = in.c.row(m + row);
    const int64_t later = row + 2 * rows.height;
    const float* const ahead = in.accumulate && later < rows.count ? in.c.row(m + later) : nullptr;
    for (int64_t v = 0; v < vectors_of<Numbers>(in.b, p); ++v) {
      const int64_t column = (gates ? p : p * kPanelVectors + v) * kSide;
      const int64_t at = gates ? column + v * count : column;
      if (ahead) __builtin_prefetch(ahead + at, 1, 3);
      with_lanes<float>(count - column, [&](auto part) {
        Vec<float> sum = load(sums + v * kSide);
        if (in.start) sum += part.get(in.start + at);
        if (in.accumulate) sum += part.get((const float*)c + at);
        part.put(c + at, sum);
      });
    }
  };
  if constexpr (kOnTiles<Numbers>) {
    const TileShape shape(rows.height);
    Rest<1, decltype(put)> rest(rows, left.steps, put);
    for (int64_t p = p0; p < p1; ++p) sum_panel<Numbers>(left, rows, in.b, p, rest);
    rest.finish();
  } else {
    for (int64_t p = p0; p < p1; ++p) sum_panel_by_dots(left, rows, in.b, p, put);
  }
}

// A product whose sums begin with C, or with zeros: the tiles are those of C itself, but at its
// edges, where they are copies.
template <class Numbers, int Terms>
void product_in_place(const Left<Terms>& left, const RowTiles& rows, int64_t m,
                      const Product<float>& in, int64_t p0, int64_t p1) {
  const Rows<float>& c = in.c;
  const bool even = c.batch == 1 || c.step_t == c.batch * c.step_n;
  const int64_t step = c.batch == 1 ? c.step_t : c.step_n;
  const TileShape shape(rows.height);
  Sums edge;
  for (int64_t p = p0; p < p1; ++p) {
    const float* const b = in.b.at(p);
    const int64_t first = p * kPanelVectors * kSide;
    with_int<kPanelVectors>(vectors_of<Numbers>(in.b, p), [&](auto many) {
      constexpr int V = decltype(many)::value;
      for (int64_t t = 0; t < rows.tiles; t += 2) {
        const int64_t row = t * rows.height, height = (t + 1 < rows.tiles ? 2 : 1) * rows.height;
        const int64_t count = rows.count - row < height ? rows.count - row : height;
        const bool whole = even && count == height && first + V * kSide <= in.columns.count;
        const auto copy = [&](bool out) {
          for (int64_t r = 0; r < count; ++r)
            for (int v = 0; v < V; ++v) {
              float* const at = c.row(m + row + r) + first + v * kSide;
              float* const to = edge.of[r / rows.height][r % rows.height][v];
              with_lanes<float>(in.columns.count - first - v * kSide, [&](auto part) {
                if (out)
                  part.put(at, load((const float*)to));
                else
                  store(to, part.get((const float*)at));
              });
            }
        };
        if (!whole && in.accumulate) copy(false);
        const Place sums = whole ? Place(c.row(m + row) + first, step, kSide, rows.height)
                                 : Place(&edge, rows.height);
        sum_rows_at<Numbers, V>(rows, t, !in.accumulate, sums, left.steps,
                                [&](auto tall, int v, auto wide, int64_t from, int64_t past) {
                                  add_tiles<Numbers, decltype(tall)::value, decltype(wide)::value>(
                                      left, t, b + v * kTileOf<Numbers>, V, from, past, [] {});
                                });
        if (!whole) copy(true);
      }
    });
  }
}

template <class Numbers, int Terms>
void product_of(const Left<Terms>& left, const RowTiles& rows, int64_t m, const Product<float>& in,
                int64_t p0, int64_t p1) {
  // With chains, a sum that begins with C would be one over all passes.
  if constexpr (kOnTiles<Numbers> && Numbers::kChain == 0)
    if (!in.columns.gates) return product_in_place<Numbers>(left, rows, m, in, p0, p1);
  product_and_rest<Numbers>(left, rows, m, in, p0, p1);
}

template <class Numbers, int Terms>
void product_of_rows(const Product<float>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t terms = Terms * k_steps(in.depth) * kDepthOfTile;
  for_parts(m0, m1, terms, [&](int64_t m, const RowTiles& rows) {
    const auto row = [&](int64_t r) { return in.a.row(m + r); };
    const auto left = split<Terms>(rows, in.depth, in.scratch, row);
    product_of<Numbers>(left, rows, m, in, p0, p1);
  });
}

// Of a product the `depth` k from `k` on, or what is left.
inline Product<float> pass_of(const Product<float>& in, int64_t k, int64_t depth) {
  Product<float> pass = in;
  pass.a.data += k;
  pass.depth = in.depth - k < depth ? in.depth - k : depth;
  pass.b = in.b.from_row(k);
  if (k > 0) {
    pass.start = nullptr;
    pass.accumulate = true;
  }
  return pass;
}

template <class Numbers>
void product_of_terms(const Product<float>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (in.strip)
    return product_of<Numbers>(Left<Numbers::kComputed>(in.a.data, in.depth),
                               RowTiles::of_strip(m1 - m0), m0, in, p0, p1);
  for (int64_t k = 0; k < in.depth; k += kPass)
    (in.given
         ? product_of_rows<Numbers, Numbers::kGiven>
         : product_of_rows<Numbers, Numbers::kComputed>)(pass_of(in, k, kPass), m0, m1, p0, p1);
}

// With so many k-steps the cells of a row are done while the tiles multiply. With fewer they take
// longer than the tiles; two rows side by side then fill the gaps in each other's operations.
constexpr int64_t kStepsOfCell = 12;

template <class Numbers>
void step_forward_of_terms(const StepForward<float>& in, int64_t n0, int64_t n1, int64_t p0,
                           int64_t p1) {
  constexpr int V = kPanelVectors, OfX = Numbers::kGiven, OfH = Numbers::kComputed;
  const int64_t H = in.hidden, x_steps = k_steps(in.input), h_steps = k_steps(in.output);
  const int64_t terms = (x_steps * OfX + h_steps * OfH) * kDepthOfTile;
  for_parts(n0, n1, terms, [&](int64_t n, const RowTiles& rows) {
    const auto x =
        split<OfX>(rows, in.input, in.scratch, [&](int64_t r) { return in.x.at(0, n + r); });
    const auto h = split<OfH>(rows, in.output, in.scratch + rows.tiles * x_steps * OfX * kTileSize,
                              [&](int64_t r) { return in.h_prev.at(0, n + r); });
    const auto cells = [&](int64_t p, int64_t row, const float* sums, auto many) {
      constexpr int R = decltype(many)::value;
      const int64_t unit = p * kSide;
      with_lanes<float>(H - unit, [&](auto part) {
        Vec<float> z[R][4];
        for (int r = 0; r < R; ++r)
          for (int gate = 0; gate < 4; ++gate)
            z[r][gate] = part.get(in.start.at(0, n + row + r) + unit + gate * H) +
                         load(sums + r * kSumsRow + gate * kSide);
        cells_of_tile<float, R>(in, n + row, unit, z, part);
      });
    };
    const auto panel = [&](const auto& left, const float* w, int64_t p) {
      return w + p * left.steps * V * kTileOf<Numbers>;
    };
    if constexpr (kOnTiles<Numbers>) {
      const TileShape shape(rows.height);
      const auto run = [&](auto&& rest) {
        for_panels(in.step, p0, p1, [&](int64_t p, int64_t) {
          const auto sums = [&](int64_t t, auto tall, int v, auto wide, int64_t from,
                                int64_t past) {
            // Of the k-steps of x, which come first, and of h, those from `from` to `past`.
            const auto add = [&](const auto& left, const float* w, int64_t first) {
              const int64_t begin = from > first ? from - first : 0, end = past - first;
              add_tiles<Numbers, decltype(tall)::value, decltype(wide)::value>(
                  left, t, panel(left, w, p) + v * kTileOf<Numbers>, V, begin,
                  end < left.steps ? end : left.steps, [&] { rest.some(); });
            };
            add(x, in.w_ih.full(), 0);
            add(h, in.w_hh.full(), x_steps);
          };
          sum_rows_of<Numbers, V>(rows, p, x_steps + h_steps, rest, sums);
        });
        rest.finish();
      };
      if (x_steps + h_steps < kStepsOfCell)
        run(Rest<2, decltype(cells)>(rows, x_steps + h_steps, cells));
      else
        run(Rest<1, decltype(cells)>(rows, x_steps + h_steps, cells));
    } else {
      for_panels(in.step, p0, p1, [&](int64_t p, int64_t) {
        const DotsOf products[2] = {{x, panel(x, in.w_ih.full(), p)},
                                    {h, panel(h, in.w_hh.full(), p)}};
        sum_rows_by_dots<V>(products, rows, p, cells);
      });
    }
  });
}

template <class Numbers>
void step_backward_of_terms(const StepBackward<float>& in, int64_t n0, int64_t n1, int64_t p0,
                            int64_t p1) {
  constexpr int Terms = Numbers::kComputed;
  const int64_t H = in.hidden, steps = k_steps(in.depth);
  if (!in.next.data) return step_backward<float>(in, n0, n1, p0, p1);
  // Where not all rows have room as terms, they are multiplied chain by chain: W, which then mostly
  // comes from L3, is read fewer times than once for each part of them. The sums stand in dz.
  const Product<float> product{in.next, in.depth, in.w,  in.dz, {H, false},
                               nullptr, false,    false, false, in.scratch};
  const bool fit = n1 - n0 <= rows_at_once(Terms * steps * kDepthOfTile);
  const int64_t passes = fit ? 1 : chains_of<Numbers>(steps);
  const auto pass_at = [&](int64_t c) {
    const int64_t first = steps * c / passes, past = steps * (c + 1) / passes;
    return pass_of(product, first * kDepthOfTile, (past - first) * kDepthOfTile);
  };
  for (int64_t c = 0; c < passes - 1; ++c)
    product_of_rows<Numbers, Terms>(pass_at(c), n0, n1, p0, p1);

  const auto last = pass_at(passes - 1);
  const int64_t last_steps = k_steps(last.depth);
  for_parts(n0, n1, Terms * last_steps * kDepthOfTile, [&](int64_t n, const RowTiles& rows) {
    const auto left =
        split<Terms>(rows, last.depth, in.scratch, [&](int64_t r) { return last.a.at(0, n + r); });
    const auto cells = [&](int64_t p, int64_t row, const float* sums, Int<1>) {
      for (int64_t v = 0; v < vectors_of<Numbers>(in.w, p); ++v) {
        const int64_t unit = (p * kPanelVectors + v) * kSide;
        with_lanes<float>(H - unit, [&](auto part) {
          Vec<float> dh = load(sums + v * kSide);
          if (last.accumulate) dh += part.get((const float*)in.dz.at(0, n + row) + unit);
          if (in.grad_y.data) dh += part.get(in.grad_y.at(0, n + row) + unit);
          if (in.grad_h.data) dh += part.get(in.grad_h.at(0, n + row) + unit);
          cell_backward<float>(in, n + row, unit, dh, part);
        });
      }
    };
    if constexpr (kOnTiles<Numbers>) {
      const TileShape shape(rows.height);
      Rest<1, decltype(cells)> rest(rows, last_steps, cells);
      for_panels(in.step, p0, p1,
                 [&](int64_t p, int64_t) { sum_panel<Numbers>(left, rows, last.b, p, rest); });
      rest.finish();
    } else {
      for_panels(in.step, p0, p1,
                 [&](int64_t p, int64_t) { sum_panel_by_dots(left, rows, last.b, p, cells); });
    }
  });
}

template <class Numbers>
constexpr Kernels<float> tiles_table() {
  Kernels<float> kernels = table<float>();
  kernels.panel_row = kPanelVectors * kSide * Numbers::kGiven / 2;
  kernels.panel_depth = kDepthOfTile;
  kernels.narrow_end = false;
  kernels.panel_cycles = Numbers::kCycles;
  kernels.tile_rows = kOnTiles<Numbers> ? kSide : kTileRows;
  kernels.strip_rows = 192;
  kernels.strip_depth = Numbers::kStripDepth;
  kernels.strip_size = kernels.strip_rows * kernels.strip_depth * Numbers::kComputed / 2;
  kernels.scratch_size = terms_size<Numbers>;
  kernels.pack_gates = pack_gates_as_terms<Numbers>;
  kernels.pack_rows = pack_rows_as_terms<Numbers, float>;
  kernels.pack_matrix = pack_matrix_as_terms<Numbers>;
  kernels.pack_columns = pack_columns_as_terms<Numbers>;
  kernels.transpose = transpose_terms<Numbers>;
  kernels.sum_rows = sum_rows_of_terms<Numbers>;
  kernels.product = product_of_terms<Numbers>;
  kernels.step_forward = step_forward_of_terms<Numbers>;
  kernels.step_backward = step_backward_of_terms<Numbers>;
  return kernels;
}

}  // namespace

extern const Kernels<float> kernels_bf16 = tiles_table<Bf16>();
extern const Kernels<float> kernels_f32_tiles = tiles_table<Floats>();
extern const Kernels<float> kernels_bf16_dots = tiles_table<Dots>();

}  // namespace FASTLSTM_ISA
}  // namespace fastlstm
