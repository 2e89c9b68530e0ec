// The instructions of tiles.inl in plain AVX-512, so that its kernels run, and are tested, on CPUs
// that have no such instructions: a build with FASTLSTM_EMULATE_TILES. What they compute is what
// Intel's manual says of TDPBF16PS and VDPBF16PS; without a shape they end the process, as the CPU
// does. Included only by tiles.inl.

struct alignas(64) TilesOfThread {
  float of[8][kSide][kSide];
  uint8_t rows[8];  // 0 without a shape
};
thread_local TilesOfThread tiles = {};

FASTLSTM_INLINE void configure_tiles(const TileConfig& config) {
  __builtin_memcpy(tiles.rows, config.rows, sizeof tiles.rows);
}
FASTLSTM_INLINE void release_tiles() { __builtin_memset(tiles.rows, 0, sizeof tiles.rows); }
inline int64_t rows_of_tile(int tile) {
  if (tiles.rows[tile] == 0) __builtin_trap();
  return tiles.rows[tile];
}

template <int Tile>
void tile_zero() {
  rows_of_tile(Tile);
  __builtin_memset(tiles.of[Tile], 0, sizeof tiles.of[Tile]);
}
// The rows that the shape leaves out become zeros.
template <int Tile>
void tile_load(const float* from, int64_t step = kSide) {
  const int64_t rows = rows_of_tile(Tile);
  for (int64_t r = 0; r < kSide; ++r)
    store(tiles.of[Tile][r], r < rows ? load(from + r * step) : Vec<float>{});
}
template <int Tile>
void tile_store(float* to, int64_t step = kSide) {
  for (int64_t r = 0; r < rows_of_tile(Tile); ++r)
    store(to + r * step, load((const float*)tiles.of[Tile][r]));
}

// The halves of words of two bfloat16, as floats.
FASTLSTM_INLINE Vec<float> even_of(Vec<float> words) {
  return (Vec<float>)((Bits<float>)words << 16);
}
FASTLSTM_INLINE Vec<float> odd_of(Vec<float> words) {
  return (Vec<float>)((Bits<float>)words & -0x10000);
}

// A sum of its own for the even and the odd k, which are added up, and then to C.
template <int C, int A, int B>
void tile_multiply() {
  for (int64_t r = 0; r < rows_of_tile(C); ++r) {
    Vec<float> even{}, odd{};
    for (int64_t k = 0; k < kSide; ++k) {
      const Vec<float> a = broadcast(tiles.of[A][r][k]), b = load((const float*)tiles.of[B][k]);
      even = fma(even_of(a), even_of(b), even);
      odd = fma(odd_of(a), odd_of(b), odd);
    }
    float* const c = tiles.of[C][r];
    store(c, load((const float*)c) + (even + odd));
  }
}

FASTLSTM_INLINE void add_dots(Vec<float>& sums, Vec<float> a, Vec<float> b) {
  sums = fma(even_of(a), even_of(b), fma(odd_of(a), odd_of(b), sums));
}
