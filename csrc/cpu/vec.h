// Vectors of one register, for the ISA this file is compiled for. Included only by kernels.inl,
// inside the namespace of that ISA, so no two ISAs ever share a function.
//
// Arithmetic, comparisons and selection are the compiler's own vector operators (GCC and Clang);
// here stands only what they lack.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 x 4 accumulators + 6 broadcasts + 1 panel vector of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;  // 3 x 4 + 3 + 1 of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 5;  // 5 x 4 + 5 + 4: loads come in pairs, before the sums
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 2;  // 2 x 4 + 2 + products of 16 registers
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float InMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
};
template <>
struct VectorOf<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double InMemory __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
};
template <class T>
using Vec = typename VectorOf<T>::Vector;
template <class T>
using Bits = typename VectorOf<T>::Bits;

template <class T>
constexpr int lanes() {
  return kVectorBytes / int(sizeof(T));
}

#define FASTLSTM_INLINE inline __attribute__((always_inline))
#define FASTLSTM_INLINE_LAMBDA __attribute__((always_inline))  // after its parameters

template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::InMemory*>(p);
}
template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::InMemory*>(p) = v;
}
template <class T>
FASTLSTM_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // x - 0 is x, -0 and NaN included
}

// fma(a, b, c): a * b + c, rounded once where the ISA can.
// load(p, n): the first n lanes from memory, zeros above. store(p, v, n): the first n lanes only.
// at_most(x, bound), at_least(x, bound): the smaller or larger; a NaN in x stays.
// ldexp(v, n): v * 2^n for an integral n, right for denormal results and beyond the exponent range.
#if defined(__AVX512F__)
FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
FASTLSTM_INLINE Vec<float> load(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
FASTLSTM_INLINE Vec<double> load(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
FASTLSTM_INLINE void store(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
}
FASTLSTM_INLINE void store(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
}
FASTLSTM_INLINE Vec<float> ldexp(Vec<float> v, Vec<float> n) {
  return _mm512_maskz_scalef_ps(__mmask16(-1), v, n);
}
FASTLSTM_INLINE Vec<double> ldexp(Vec<double> v, Vec<double> n) {
  return _mm512_maskz_scalef_pd(__mmask8(-1), v, n);
}
FASTLSTM_INLINE Vec<float> at_most(Vec<float> x, Vec<float> bound) {
  return _mm512_maskz_min_ps(__mmask16(-1), bound, x);
}
FASTLSTM_INLINE Vec<double> at_most(Vec<double> x, Vec<double> bound) {
  return _mm512_maskz_min_pd(__mmask8(-1), bound, x);
}
FASTLSTM_INLINE Vec<float> at_least(Vec<float> x, Vec<float> bound) {
  return _mm512_maskz_max_ps(__mmask16(-1), bound, x);
}
FASTLSTM_INLINE Vec<double> at_least(Vec<double> x, Vec<double> bound) {
  return _mm512_maskz_max_pd(__mmask8(-1), bound, x);
}
#else
#if defined(__AVX2__) && defined(__FMA__)
FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
FASTLSTM_INLINE Vec<float> at_most(Vec<float> x, Vec<float> bound) {
  return _mm256_min_ps(bound, x);
}
FASTLSTM_INLINE Vec<double> at_most(Vec<double> x, Vec<double> bound) {
  return _mm256_min_pd(bound, x);
}
FASTLSTM_INLINE Vec<float> at_least(Vec<float> x, Vec<float> bound) {
  return _mm256_max_ps(bound, x);
}
FASTLSTM_INLINE Vec<double> at_least(Vec<double> x, Vec<double> bound) {
  return _mm256_max_pd(bound, x);
}
template <class T>
FASTLSTM_INLINE __m256i first_lanes(int64_t n) {
  Bits<T> lane;
  for (int l = 0; l < lanes<T>(); ++l) lane[l] = l;
  return (__m256i)(lane < (Bits<T>{} + typename VectorOf<T>::Int(n)));
}
FASTLSTM_INLINE Vec<float> load(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, first_lanes<float>(n));
}
FASTLSTM_INLINE Vec<double> load(const double* p, int64_t n) {
  return _mm256_maskload_pd(p, first_lanes<double>(n));
}
FASTLSTM_INLINE void store(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes<float>(n), v);
}
FASTLSTM_INLINE void store(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes<double>(n), v);
}
#else
template <class V>
FASTLSTM_INLINE V fma(V a, V b, V c) {
#if defined(__aarch64__)
  if constexpr (sizeof(a[0]) == 4)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else
    return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
template <class V>
FASTLSTM_INLINE V at_most(V x, V bound) {
  return bound < x ? bound : x;
}
template <class V>
FASTLSTM_INLINE V at_least(V x, V bound) {
  return x < bound ? bound : x;
}
template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p, int64_t n) {
  Vec<T> v{};
  for (int l = 0; l < lanes<T>(); ++l)
    if (l < n) v[l] = p[l];
  return v;
}
template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v, int64_t n) {
  for (int l = 0; l < lanes<T>(); ++l)
    if (l < n) p[l] = v[l];
}
#endif

// In two factors, neither of which leaves the exponent range.
FASTLSTM_INLINE Vec<float> ldexp(Vec<float> v, Vec<float> n) {
  const Vec<float> round = broadcast(0x1.8p23f), biased = broadcast(0x1.8p23f + 127);
  const Vec<float> half = (n * 0.5f + round) - round;
  return v * (Vec<float>)((Bits<float>)(half + biased) << 23) *
         (Vec<float>)((Bits<float>)(n - half + biased) << 23);
}
FASTLSTM_INLINE Vec<double> ldexp(Vec<double> v, Vec<double> n) {
  const Vec<double> round = broadcast(0x1.8p52), biased = broadcast(0x1.8p52 + 1023);
  const Vec<double> half = (n * 0.5 + round) - round;
  return v * (Vec<double>)((Bits<double>)(half + biased) << 52) *
         (Vec<double>)((Bits<double>)(n - half + biased) << 52);
}
#endif

// As many halves as a vector has floats, from and to memory; with n, the first n of them. No copy
// of n * 2 bytes: that is a call, around which every vector is stored.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalvesInMemory
    __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias));
FASTLSTM_INLINE Halves load_halves(const void* p) { return *static_cast<const HalvesInMemory*>(p); }
FASTLSTM_INLINE void store_halves(void* p, Halves halves) {
  *static_cast<HalvesInMemory*>(p) = halves;
}
#if defined(__AVX2__)
// Two by two, and the last of an odd number by itself.
FASTLSTM_INLINE Halves load_halves(const uint16_t* p, int64_t n) {
  const int32_t last = n % 2 ? p[n - 1] : 0;
#if defined(__AVX512F__)
  const __m512i pairs = _mm512_maskz_loadu_epi32(__mmask16((1u << n / 2) - 1), p);
  const __m512i all = _mm512_mask_set1_epi32(pairs, __mmask16(1u << n / 2), last);
  return (Halves)_mm512_maskz_extracti64x4_epi64(__mmask8(-1), all, 0);
#else
  const __m128i pair = _mm_setr_epi32(0, 1, 2, 3), whole = _mm_set1_epi32(int(n / 2));
  const __m128i pairs = _mm_maskload_epi32((const int*)p, _mm_cmpgt_epi32(whole, pair));
  return (Halves)_mm_or_si128(pairs,
                              _mm_and_si128(_mm_cmpeq_epi32(whole, pair), _mm_set1_epi32(last)));
#endif
}
#else
FASTLSTM_INLINE Halves load_halves(const uint16_t* p, int64_t n) {
  Halves halves{};
  for (int l = 0; l < lanes<float>(); ++l)
    if (l < n) halves[l] = p[l];
  return halves;
}
#endif
FASTLSTM_INLINE void store_halves(uint16_t* p, Halves halves, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi16(p, __mmask16((1u << n) - 1),
                                    _mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)halves));
#else
  for (int l = 0; l < lanes<float>(); ++l)
    if (l < n) p[l] = halves[l];
#endif
}

// Floats of halves and, to nearest, ties to even, halves of floats.
#if defined(__AVX512F__)
FASTLSTM_INLINE Vec<float> from_float16(Halves halves) {
  return _mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)halves);
}
FASTLSTM_INLINE Halves to_float16(Vec<float> v) {
  return (Halves)_mm512_maskz_cvtps_ph(__mmask16(-1), v, 0);
}
#elif defined(__F16C__)
FASTLSTM_INLINE Vec<float> from_float16(Halves halves) { return _mm256_cvtph_ps((__m128i)halves); }
FASTLSTM_INLINE Halves to_float16(Vec<float> v) { return (Halves)_mm256_cvtps_ph(v, 0); }
#elif defined(__aarch64__)
FASTLSTM_INLINE Vec<float> from_float16(Halves halves) {
  return (Vec<float>)vcvt_f32_f16((float16x4_t)halves);
}
FASTLSTM_INLINE Halves to_float16(Vec<float> v) { return (Halves)vcvt_f16_f32((float32x4_t)v); }
#else
FASTLSTM_INLINE Vec<float> from_float16(Halves halves) {
  Vec<float> v;
  for (int l = 0; l < lanes<float>(); ++l) {
    const uint32_t sign = uint32_t(halves[l] & 0x8000) << 16, rest = halves[l] & 0x7fff;
    uint32_t bits = (rest << 13) + (uint32_t(127 - 15) << 23);
    if (rest >= 0x7c00) bits += uint32_t(255 - 31 - (127 - 15)) << 23;  // infinity, NaN
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    if (rest < 0x400) f = float(rest) * 0x1p-24f;  // zero, denormal
    v[l] = sign ? -f : f;
  }
  return v;
}
FASTLSTM_INLINE Halves to_float16(Vec<float> v) {
  Halves halves{};
  for (int l = 0; l < lanes<float>(); ++l) {
    const float f = v[l], size = f < 0 ? -f : f;
    uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (bits >= 0x477ff000) {
      half = 0x7c00;  // rounds to infinity
    } else if (bits < 0x38800000) {
      const float placed = size + 0.5f;  // its last bit is that of a denormal
      __builtin_memcpy(&half, &placed, sizeof half);
      half -= 0x3f000000;
    } else {
      half = (bits - (uint32_t(127 - 15) << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    halves[l] = uint16_t(sign | half);
  }
  return halves;
}
#endif
FASTLSTM_INLINE Vec<float> from_bfloat16(Halves halves) {
#if defined(__AVX512F__)  // one instruction, which GCC does not find by itself
  const auto words = (Bits<float>)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)halves);
#elif defined(__AVX2__)
  const auto words = (Bits<float>)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const auto words = __builtin_convertvector(halves, Bits<float>);
#endif
  return (Vec<float>)(words << 16);
}
// Bits whose upper halves are v in bfloat16, to nearest, ties to even.
FASTLSTM_INLINE Bits<float> rounded_to_bfloat16(Vec<float> v) {
  const Bits<float> bits = (Bits<float>)v;
  const Bits<float> rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  return v == v ? rounded : quiet;
}
FASTLSTM_INLINE Halves to_bfloat16(Vec<float> v) {
  return __builtin_convertvector(rounded_to_bfloat16(v) >> 16, Halves);
}

FASTLSTM_INLINE Vec<float> load(const Float16* p) { return from_float16(load_halves(p)); }
FASTLSTM_INLINE Vec<float> load(const BFloat16* p) { return from_bfloat16(load_halves(p)); }
FASTLSTM_INLINE Vec<float> load(const Float16* p, int64_t n) {
  return from_float16(load_halves(&p->bits, n));
}
FASTLSTM_INLINE Vec<float> load(const BFloat16* p, int64_t n) {
  return from_bfloat16(load_halves(&p->bits, n));
}
FASTLSTM_INLINE void store(Float16* p, Vec<float> v) { store_halves(p, to_float16(v)); }
FASTLSTM_INLINE void store(BFloat16* p, Vec<float> v) { store_halves(p, to_bfloat16(v)); }
FASTLSTM_INLINE void store(Float16* p, Vec<float> v, int64_t n) {
  store_halves(&p->bits, to_float16(v), n);
}
FASTLSTM_INLINE void store(BFloat16* p, Vec<float> v, int64_t n) {
  store_halves(&p->bits, to_bfloat16(v), n);
}

template <class T>
FASTLSTM_INLINE T sum(Vec<T> v) {
  // Halves added to halves: the same order on every call.
  for (int width = lanes<T>() / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) v[l] += v[l + width];
  return v[0];
}

// Lanes<0, 1, ..., VL - 1>, to write shuffles of any width once.
template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  typedef Lanes<L...> type;
};

// Exchanges the lanes l of a that have bit S set with the lanes l - S of b.
template <int S, class T, int... L>
FASTLSTM_INLINE void exchange(Vec<T>& a, Vec<T>& b, Lanes<L...>) {
  constexpr int VL = sizeof...(L);
#if defined(__clang__)
  const Vec<T> low = __builtin_shufflevector(a, b, ((L & S) ? VL + L - S : L)...);
  b = __builtin_shufflevector(a, b, ((L & S) ? VL + L : L + S)...);
#else
  const Vec<T> low = __builtin_shuffle(a, b, Bits<T>{((L & S) ? VL + L - S : L)...});
  b = __builtin_shuffle(a, b, Bits<T>{((L & S) ? VL + L : L + S)...});
#endif
  a = low;
}

// Transposes a VL x VL block in registers: halves, then quarters, ... change places.
template <class T, int S = lanes<T>() / 2>
FASTLSTM_INLINE void transpose_block(Vec<T> (&row)[lanes<T>()]) {
  for (int i = 0; i < lanes<T>(); ++i)
    if (!(i & S)) exchange<S, T>(row[i], row[i + S], typename CountLanes<lanes<T>()>::type());
  if constexpr (S > 1) transpose_block<T, S / 2>(row);
}

// The sum of each of VL vectors, as the lanes of one; in the order of sum(). Changes `v`.
template <class T, int S = lanes<T>() / 2>
FASTLSTM_INLINE Vec<T> sum_each(Vec<T>* v) {
  for (int i = 0; i < S; ++i) {
    exchange<S, T>(v[i], v[i + S], typename CountLanes<lanes<T>()>::type());
    v[i] += v[i + S];
  }
  if constexpr (S > 1)
    return sum_each<T, S / 2>(v);
  else
    return v[0];
}
