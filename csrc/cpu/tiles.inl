// The products of bfloat16 values on AMX tiles, for x86-64 CPUs that have them. Included after
// kernels.inl, whose cells and transposes it shares.
//
// A tile product adds A (16, 32) B (32, 16) of bfloat16 to C (16, 16) of float, with the sums in
// float. What is exact in bfloat16 (weights, x, and the y that training keeps) goes in as it is; a
// float (h, dz) as the sum of two terms, which leaves an error of at most 2^-16 of it.
//
// A panel is, for each k-step of 32 and each of its vectors, a tile of B: 16 rows, each of 16
// columns of two neighbouring k. Rows of A are cut into tiles of nearly equal height; the tiles of
// all k-steps of a row tile follow each other, the terms of a k-step side by side.

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

FASTLSTM_INLINE int64_t k_steps(int64_t depth) { return (depth + kDepthOfTile - 1) / kDepthOfTile; }

// ---- instructions -------------------------------------------------------------------------------
// Not the compiler's intrinsics, which take no template argument for a tile.

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
template <int C, int A, int B>
FASTLSTM_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tiles 0 to 3 are sums, 4 and 5 hold A, 6 and 7 B.
constexpr int kTileA = 4, kTileB = 6;

// The shape of the tiles while it lives: `height` rows of A and of C.
class TileShape {
 public:
  explicit TileShape(int64_t height) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = 64;
      shape.rows[tile] = uint8_t(tile < kTileB ? height : kSide);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileShape() { __asm__ volatile("tilerelease"); }
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

// What v has beyond its upper half, so that its own upper half is that rounded; nothing of an
// infinity or NaN.
FASTLSTM_INLINE Vec<float> second_term(Vec<float> v) {
  const __m512i twice = _mm512_add_epi32((__m512i)v, (__m512i)v);  // without the sign
  const __mmask16 finite = _mm512_cmplt_epu32_mask(twice, _mm512_set1_epi32(int32_t(0xff000000)));
  const Vec<float> upper = (Vec<float>)((Bits<float>)v & kUpper);
  const Vec<float> rest = _mm512_maskz_sub_ps(finite, v, upper);
  return (Vec<float>)((Bits<float>)rest + 0x8000);
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
  // Of the height that `transpose_bf16` writes.
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
  int64_t steps;
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
      store(to, upper_halves(low, high));
      if constexpr (Terms == 2)
        store(to + kTileSize, upper_halves(second_term(low), second_term(high)));
      to += Terms * kTileSize;
    };
    int64_t k = 0;
    for (; k + kDepthOfTile <= depth; k += kDepthOfTile)
      put(load(from + k), load(from + k + kSide));
    if (k < depth)
      put(load_some(from + k, depth - k), load_some(from + k + kSide, depth - k - kSide));
  }
  return {out, steps};
}

// The transposed columns m0 <= m < m1 of `count` rows, as terms: `out` is what Left has for their
// products.
void transpose_bf16(Rows<const float> a, int64_t count, int64_t m0, int64_t m1, float* out,
                    int64_t) {
  for (int64_t m = m0; m < m1; m += kSide)
    for (int64_t k = 0; k < count; k += kDepthOfTile, out += 2 * kTileSize) {
      Vec<float> first[kSide], second[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        const auto row = [&](int64_t k) {
          return k < count ? load_some(a.row(k) + m, m1 - m) : Vec<float>{};
        };
        const Vec<float> even = row(k + 2 * i), odd = row(k + 2 * i + 1);
        const auto words = [](Vec<float> low, Vec<float> high) {
          return (Vec<float>)(((Bits<float>)low >> 16 & 0xffff) | ((Bits<float>)high & kUpper));
        };
        first[i] = words(even, odd);
        second[i] = words(second_term(even), second_term(odd));
      }
      transpose_block<float>(first);
      transpose_block<float>(second);
      for (int64_t i = 0; i < kSide; ++i) {
        store(out + i * kPairRow, first[i]);
        store(out + kTileSize + i * kPairRow, second[i]);
      }
    }
}

void sum_rows_bf16(const float* a, int64_t, int64_t rows, int64_t columns, float* out,
                   bool accumulate) {
  const int64_t tiles = 2 * k_steps(columns);  // of a row tile
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

// Adds A B to the sums of M tiles of rows by W tiles of columns, in the order of k whatever M and
// W. `b` is the first of W neighbours among the `vectors` tiles of a k-step. between(k-step) comes
// after each.
template <int M, int W, int Terms, class Between>
FASTLSTM_INLINE void add_tiles(const Left<Terms>& left, int64_t t, const float* b, int64_t vectors,
                               Between&& between) {
  const float* a[M];
  for (int m = 0; m < M; ++m) a[m] = left.tile(t + m);
  for (int64_t s = 0; s < left.steps; ++s, b += vectors * kTileSize) {
    if constexpr (M == 2) {
      tile_load<kTileB>(b);
      if constexpr (W == 2) tile_load<kTileB + 1>(b + kTileSize);
      for (int term = 0; term < Terms; ++term) {
        tile_load<kTileA>(a[0] + term * kTileSize);
        tile_multiply<0, kTileA, kTileB>();
        if constexpr (W == 2) tile_multiply<1, kTileA, kTileB + 1>();
        tile_load<kTileA + 1>(a[1] + term * kTileSize);
        tile_multiply<2, kTileA + 1, kTileB>();
        if constexpr (W == 2) tile_multiply<3, kTileA + 1, kTileB + 1>();
      }
    } else {
      tile_load<kTileA>(a[0]);
      if constexpr (Terms == 2) tile_load<kTileA + 1>(a[0] + kTileSize);
      const auto column = [&](auto place) {
        constexpr int v = decltype(place)::value;
        if constexpr (v < W) {
          constexpr int B = kTileB + v % 2;
          tile_load<B>(b + v * kTileSize);
          tile_multiply<v, kTileA, B>();
          if constexpr (Terms == 2) tile_multiply<v, kTileA + 1, B>();
        }
      };
      column(Int<0>());
      column(Int<1>());
      column(Int<2>());
      column(Int<3>());
    }
    for (int m = 0; m < M; ++m) a[m] += Terms * kTileSize;
    between(s);
  }
}

// Sums of one or two tiles of rows: [row tile][vector of a panel][row][column].
struct alignas(64) Sums {
  float of[2][kPanelVectors][kSide][kSide];
};

// Where the sums of one or two tiles of rows and the vectors of a panel stand: floats from row to
// row, from vector to vector, from tile to tile.
struct Place {
  float* data;
  int64_t row, vector, tile;
  Place(Sums* sums)
      : data(&sums->of[0][0][0][0]),
        row(kSide),
        vector(kTileSize),
        tile(kPanelVectors * kTileSize) {}
  Place(float* data, int64_t row, int64_t vector, int64_t tile)
      : data(data), row(row), vector(vector), tile(tile) {}
};

// What add(Int<M>(), first vector, Int<W>()) adds to the sums of M row tiles and of W vectors from
// `first` on, which begin with what is there or, if `fresh`, with zeros.
template <int M, int W, class Add>
FASTLSTM_INLINE void sum_tiles(int first, bool fresh, const Place& sums, Add&& add) {
  const auto each = [&](auto&& f) {
    const auto one = [&](auto number) {
      constexpr int C = decltype(number)::value, kWide = M == 2 ? 2 : 4;
      if constexpr (C / kWide < M && C % kWide < W)
        f(number, sums.data + C / kWide * sums.tile + (first + C % kWide) * sums.vector);
    };
    one(Int<0>());
    one(Int<1>());
    one(Int<2>());
    one(Int<3>());
  };
  if (fresh)
    each([](auto tile, float*) { tile_zero<decltype(tile)::value>(); });
  else
    each([&](auto tile, float* at) { tile_load<decltype(tile)::value>(at, sums.row); });
  add(Int<M>(), first, Int<W>());
  each([&](auto tile, float* at) { tile_store<decltype(tile)::value>(at, sums.row); });
}

// The same of V vectors and of row tiles from t on, two if there are.
template <int V, class Add>
FASTLSTM_INLINE void sum_rows_at(const RowTiles& rows, int64_t t, bool fresh, const Place& sums,
                                 Add&& add) {
  if (t + 1 < rows.tiles) {
    sum_tiles<2, V == 1 ? 1 : 2>(0, fresh, sums, add);
    if constexpr (V > 2) sum_tiles<2, V - 2>(2, fresh, sums, add);
  } else {
    sum_tiles<1, V>(0, fresh, sums, add);
  }
}

// What is to be done with sums, R rows at a time: f(panel, first row, sums of its vectors,
// kTileSize apart, Int<rows>). It is done while the tiles multiply for the next sums, which leaves
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
      f_(panel_, first_ + done_, sums_[current_].of[tile][0][row], many);
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
// them. add(first row tile, Int<row tiles>, first vector, Int<vectors>, pass) adds to them.
template <int V, int R, class F, class Add>
FASTLSTM_INLINE void sum_rows_of(const RowTiles& rows, int64_t panel, Rest<R, F>& rest, Add&& add) {
  int64_t pass = 0;
  for (int64_t t = 0; t < rows.tiles; t += 2) {
    sum_rows_at<V>(rows, t, true, rest.next(),
                   [&](auto m, int v, auto w) { add(t, m, v, w, pass++); });
    rest.are(panel, t, t + 1 < rows.tiles ? 2 : 1);
  }
}

// What brings the next panel into L2 while this one is used, where panels come from afar: in each
// pass over the k-steps a part of the lines of each.
class Ahead {
 public:
  Ahead(const RowTiles& rows, int64_t panels_bytes) {
    const int64_t passes = (rows.tiles + 1) / 2 * 2;
    lines_ = panels_bytes > kNear && rows.tiles > 1 ? (kLines + passes - 1) / passes : 0;
  }
  // For k-step s of a panel from `next` on.
  FASTLSTM_INLINE void ask(const float* next, int64_t vectors, int64_t pass, int64_t s) const {
    const char* from = (const char*)(next + s * vectors * kTileSize) + pass * lines_ * 64;
    for (int64_t i = 0; i < lines_; ++i) __builtin_prefetch(from + i * 64, 0, 2);
  }

 private:
  static constexpr int64_t kNear = 1 << 20;
  static constexpr int64_t kLines = kPanelVectors * kTileSize * 4 / 64;
  int64_t lines_;
};

// f(first row, rows) for parts of the rows m0 <= m < m1 whose terms, `terms` of bfloat16 for each
// row, have room in memory of terms_size().
int64_t rows_at_once(int64_t terms) {
  const int64_t rows = kTermsSize / (terms / 2) / kFewestRows * kFewestRows;
  return rows < kFewestRows ? kFewestRows : rows;
}
int64_t terms_size(int64_t rows, int64_t depth) {
  const int64_t row = k_steps(depth) * kDepthOfTile;  // floats of two terms
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

// A tile of B = W^T: `columns` rows of W, from `w` on, and `depth` of their elements.
template <class S>
FASTLSTM_INLINE void pack_tile(const S* w, int64_t step, int64_t columns, int64_t depth,
                               float* out) {
  Vec<float> block[kSide];
  for (int64_t j = 0; j < kSide; ++j)
    block[j] = j >= columns ? Vec<float>{}
                            : upper_halves(load_some(w + j * step, depth),
                                           load_some(w + j * step + kSide, depth - kSide));
  transpose_block<float>(block);
  for (int64_t k = 0; k < kSide; ++k) store(out + k * kPairRow, block[k]);
}

void pack_gates_bf16(Matrix<float> matrix, int64_t hidden, int64_t depth, int64_t p0, int64_t p1,
                     float* out) {
  const int64_t steps = k_steps(depth);
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p)
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t gate = 0; gate < kPanelVectors; ++gate)
          pack_tile(w + (gate * hidden + p * kSide) * depth + s * kDepthOfTile, depth,
                    hidden - p * kSide, depth - s * kDepthOfTile,
                    out + ((p * steps + s) * kPanelVectors + gate) * kTileSize);
  });
}

// The vectors of a panel, whose rows take half a float for each column.
FASTLSTM_INLINE int64_t vectors_of(const Panels<float>& panels, int64_t p) {
  return panels.step(p) / (kSide / 2);
}

void pack_columns_bf16(Matrix<float> matrix, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                       Panels<float> to) {
  with_elements(matrix, [&](auto* w) {
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t vectors = vectors_of(to, p);
      for (int64_t s = 0; s < k_steps(depth); ++s)
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t first = (p * kPanelVectors + v) * kSide;
          pack_tile(w + first * depth + s * kDepthOfTile, depth, columns - first,
                    depth - s * kDepthOfTile,
                    const_cast<float*>(to.at(p)) + (s * vectors + v) * kTileSize);
        }
    }
  });
}

// Rows come one after the other, so an even one may clear the place of the odd one after it, and
// the last the rest of its k-step.
template <class S>
void pack_rows_bf16(Rows<const S> b, int64_t k0, int64_t count, int64_t columns, int64_t p0,
                    int64_t p1, Panels<float> to) {
  const int64_t end = k0 + count, cleared = k_steps(end) * kDepthOfTile;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t vectors = vectors_of(to, p), first = p * kPanelVectors * kSide;
    for (int64_t k = k0; k < cleared;) {
      float* const out = const_cast<float*>(to.at(p)) + k / kDepthOfTile * vectors * kTileSize +
                         k % kDepthOfTile / 2 * kPairRow;
      const bool here = k < end, pair = k % 2 == 0 && k + 1 < end;
      const S* const row = here ? b.row(k - k0) + first : nullptr;
      const S* const after = pair ? b.row(k + 1 - k0) + first : nullptr;
      for (int64_t v = 0; v < vectors; ++v) {
        float* const place = out + v * kTileSize;
        const int64_t left = columns - first - v * kSide;
        const auto bits = [&](const S* from) {
          return (Bits<float>)load_some(from + v * kSide, left);
        };
        if (pair)
          store(place, (Vec<float>)((bits(row) >> 16 & 0xffff) | (bits(after) & kUpper)));
        else if (here && k % 2)
          store(place, (Vec<float>)(((Bits<float>)load(place) & 0xffff) | (bits(row) & kUpper)));
        else if (here)
          store(place, (Vec<float>)(bits(row) >> 16 & 0xffff));
        else if (k % 2 == 0)
          store(place, Vec<float>{});
      }
      k += pair ? 2 : 1;
    }
  }
}

void pack_matrix_bf16(Matrix<float> matrix, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                      Panels<float> to) {
  with_elements(
      matrix, [&](auto* w) { pack_rows_bf16(rows_of(w, columns), 0, depth, columns, p0, p1, to); });
}

// ---- products and steps -------------------------------------------------------------------------

// The sums of all row tiles with panel p of B, and what `rest` does with them; `next` is the panel
// after it.
template <int Terms, int R, class F>
FASTLSTM_INLINE void sum_panel(const Left<Terms>& left, const RowTiles& rows,
                               const Panels<float>& b, int64_t p, int64_t next, Rest<R, F>& rest,
                               const Ahead& ahead) {
  with_int<kPanelVectors>(vectors_of(b, p), [&](auto many) {
    constexpr int V = decltype(many)::value;
    sum_rows_of<V>(rows, p, rest, [&](int64_t t, auto tall, int v, auto wide, int64_t pass) {
      add_tiles<decltype(tall)::value, decltype(wide)::value>(
          left, t, b.at(p) + v * kTileSize, V, [&](int64_t s) {
            ahead.ask(b.at(next), vectors_of(b, next), pass, s);
            rest.some();
          });
    });
  });
}

// A product whose columns are those of gates.
template <int Terms>
void product_of_gates(const Left<Terms>& left, const RowTiles& rows, int64_t m,
                      const Product<float>& in, int64_t p0, int64_t p1) {
  const auto put = [&](int64_t p, int64_t row, const float* sums, Int<1>) {
    const int64_t unit = p * kSide, H = in.columns.count;
    float* const c = in.c.row(m + row) + unit;
    with_lanes<float>(H - unit, [&](auto part) {
      for (int64_t gate = 0; gate < kPanelVectors; ++gate) {
        Vec<float> sum = load(sums + gate * kTileSize);
        if (in.start) sum += part.get(in.start + unit + gate * H);
        if (in.accumulate) sum += part.get((const float*)c + gate * H);
        part.put(c + gate * H, sum);
      }
    });
  };
  const TileShape shape(rows.height);
  Rest<1, decltype(put)> rest(rows, left.steps, put);
  const Ahead ahead(rows, (p1 - p0) * left.steps * kPanelVectors * kTileSize * 4);
  for (int64_t p = p0; p < p1; ++p)
    sum_panel(left, rows, in.b, p, p + 1 < p1 ? p + 1 : p0, rest, ahead);
  rest.finish();
}

// A product whose sums begin with C, or with zeros: the tiles are those of C itself, but at its
// edges, where they are copies.
template <int Terms>
void product_of(const Left<Terms>& left, const RowTiles& rows, int64_t m, const Product<float>& in,
                int64_t p0, int64_t p1) {
  const Rows<float>& c = in.c;
  const bool even = c.batch == 1 || c.step_t == c.batch * c.step_n;
  const int64_t step = c.batch == 1 ? c.step_t : c.step_n;
  const TileShape shape(rows.height);
  const Ahead ahead(rows, (p1 - p0) * left.steps * kPanelVectors * kTileSize * 4);
  Sums edge;
  for (int64_t p = p0; p < p1; ++p) {
    const float* const b = in.b.at(p);
    const int64_t next = p + 1 < p1 ? p + 1 : p0;
    const int64_t first = p * kPanelVectors * kSide;
    int64_t pass = 0;
    with_int<kPanelVectors>(vectors_of(in.b, p), [&](auto many) {
      constexpr int V = decltype(many)::value;
      for (int64_t t = 0; t < rows.tiles; t += 2) {
        const int64_t row = t * rows.height, height = (t + 1 < rows.tiles ? 2 : 1) * rows.height;
        const int64_t count = rows.count - row < height ? rows.count - row : height;
        const bool whole = even && count == height && first + V * kSide <= in.columns.count;
        const auto copy = [&](bool out) {
          for (int64_t r = 0; r < count; ++r)
            for (int v = 0; v < V; ++v) {
              float* const at = c.row(m + row + r) + first + v * kSide;
              float* const to = edge.of[r / rows.height][v][r % rows.height];
              with_lanes<float>(in.columns.count - first - v * kSide, [&](auto part) {
                if (out)
                  part.put(at, load((const float*)to));
                else
                  store(to, part.get((const float*)at));
              });
            }
        };
        if (!whole && in.accumulate) copy(false);
        const Place sums =
            whole ? Place(c.row(m + row) + first, step, kSide, rows.height * step) : Place(&edge);
        sum_rows_at<V>(rows, t, !in.accumulate, sums, [&](auto tall, int v, auto wide) {
          add_tiles<decltype(tall)::value, decltype(wide)::value>(
              left, t, b + v * kTileSize, V,
              [&](int64_t s) { ahead.ask(in.b.at(next), vectors_of(in.b, next), pass, s); });
          ++pass;
        });
        if (!whole) copy(true);
      }
    });
  }
}

template <int Terms>
void product_of_rows(const Product<float>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t terms = Terms * k_steps(in.depth) * kDepthOfTile;
  for_parts(m0, m1, terms, [&](int64_t m, const RowTiles& rows) {
    const auto row = [&](int64_t r) { return in.a.row(m + r); };
    const auto left = split<Terms>(rows, in.depth, in.scratch, row);
    (in.columns.gates ? product_of_gates<Terms> : product_of<Terms>)(left, rows, m, in, p0, p1);
  });
}

void product_bf16(const Product<float>& in, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (in.strip)
    return product_of(Left<2>{in.a.data, k_steps(in.depth)}, RowTiles::of_strip(m1 - m0), m0, in,
                      p0, p1);
  Product<float> pass = in;
  for (int64_t k = 0; k < in.depth; k += kPass) {
    pass.depth = in.depth - k < kPass ? in.depth - k : kPass;
    pass.a.data = in.a.data + k;
    pass.b.data = in.b.data + k * in.b.row_step;
    pass.b.tail = in.b.tail + k * in.b.tail_row_step;
    (in.exact ? product_of_rows<1> : product_of_rows<2>)(pass, m0, m1, p0, p1);
    pass.start = nullptr;
    pass.accumulate = true;
  }
}

// With so many k-steps the cells of a row are done while the tiles multiply. With fewer they take
// longer than the tiles; two rows side by side then fill the gaps in each other's operations.
constexpr int64_t kStepsOfCell = 12;

void step_forward_bf16(const StepForward<float>& in, int64_t n0, int64_t n1, int64_t p0,
                       int64_t p1) {
  constexpr int V = kPanelVectors;
  const int64_t H = in.hidden, x_steps = k_steps(in.input), h_steps = k_steps(in.output);
  for_parts(n0, n1, (x_steps + 2 * h_steps) * kDepthOfTile, [&](int64_t n, const RowTiles& rows) {
    const auto x =
        split<1>(rows, in.input, in.scratch, [&](int64_t r) { return in.x.at(0, n + r); });
    const auto h = split<2>(rows, in.output, in.scratch + rows.tiles * kSide * x_steps * kPairRow,
                            [&](int64_t r) { return in.h_prev.at(0, n + r); });
    const auto cells = [&](int64_t p, int64_t row, const float* sums, auto many) {
      constexpr int R = decltype(many)::value;
      const int64_t unit = p * kSide;
      with_lanes<float>(H - unit, [&](auto part) {
        Vec<float> z[R][4];
        for (int r = 0; r < R; ++r)
          for (int gate = 0; gate < 4; ++gate)
            z[r][gate] = part.get(in.start.at(0, n + row + r) + unit + gate * H) +
                         load(sums + gate * kTileSize + r * kSide);
        cells_forward<float, R>(in, n + row, unit, z, part);
      });
    };
    const TileShape shape(rows.height);
    const Ahead ahead(rows, (p1 - p0) * (x_steps + h_steps) * V * kTileSize * 4);
    const auto run = [&](auto&& rest) {
      for_panels(in.step, p0, p1, [&](int64_t p, int64_t next) {
        sum_rows_of<V>(rows, p, rest, [&](int64_t t, auto tall, int v, auto wide, int64_t pass) {
          const auto add = [&](const auto& left, const float* w) {
            const int64_t panel = left.steps * V * kTileSize;
            add_tiles<decltype(tall)::value, decltype(wide)::value>(
                left, t, w + p * panel + v * kTileSize, V, [&](int64_t s) {
                  ahead.ask(w + next * panel, V, pass, s);
                  rest.some();
                });
          };
          add(x, in.w_ih.full());
          add(h, in.w_hh.full());
        });
      });
      rest.finish();
    };
    if (x_steps + h_steps < kStepsOfCell)
      run(Rest<2, decltype(cells)>(rows, x_steps + h_steps, cells));
    else
      run(Rest<1, decltype(cells)>(rows, x_steps + h_steps, cells));
  });
}

void step_backward_bf16(const StepBackward<float>& in, int64_t n0, int64_t n1, int64_t p0,
                        int64_t p1) {
  const int64_t H = in.hidden, steps = k_steps(in.depth);
  if (!in.next.data) return step_backward<float>(in, n0, n1, p0, p1);
  for_parts(n0, n1, 2 * steps * kDepthOfTile, [&](int64_t n, const RowTiles& rows) {
    const auto left =
        split<2>(rows, in.depth, in.scratch, [&](int64_t r) { return in.next.at(0, n + r); });
    const auto cells = [&](int64_t p, int64_t row, const float* sums, Int<1>) {
      for (int64_t v = 0; v < vectors_of(in.w, p); ++v) {
        const int64_t unit = (p * kPanelVectors + v) * kSide;
        with_lanes<float>(H - unit, [&](auto part) {
          Vec<float> dh = load(sums + v * kTileSize);
          if (in.grad_y.data) dh += part.get(in.grad_y.at(0, n + row) + unit);
          if (in.grad_h.data) dh += part.get(in.grad_h.at(0, n + row) + unit);
          cell_backward<float>(in, n + row, unit, dh, part);
        });
      }
    };
    const TileShape shape(rows.height);
    Rest<1, decltype(cells)> rest(rows, steps, cells);
    const Ahead ahead(rows, (p1 - p0) * steps * kPanelVectors * kTileSize * 4);
    for_panels(in.step, p0, p1,
               [&](int64_t p, int64_t next) { sum_panel(left, rows, in.w, p, next, rest, ahead); });
    rest.finish();
  });
}

constexpr Kernels<float> tiles_table() {
  Kernels<float> kernels = table<float>();
  kernels.panel_row = kPanelVectors * kSide / 2;
  kernels.panel_depth = kDepthOfTile;
  kernels.panel_cycles = 0.25;
  kernels.strip_rows = 192;
  kernels.strip_depth = 320;
  kernels.scratch_size = terms_size;
  kernels.pack_gates = pack_gates_bf16;
  kernels.pack_rows = pack_rows_bf16<float>;
  kernels.pack_matrix = pack_matrix_bf16;
  kernels.pack_columns = pack_columns_bf16;
  kernels.transpose = transpose_bf16;
  kernels.sum_rows = sum_rows_bf16;
  kernels.product = product_bf16;
  kernels.step_forward = step_forward_bf16;
  kernels.step_backward = step_backward_bf16;
  return kernels;
}

}  // namespace

extern const Kernels<float> kernels_bf16 = tiles_table();

}  // namespace FASTLSTM_ISA
}  // namespace fastlstm
