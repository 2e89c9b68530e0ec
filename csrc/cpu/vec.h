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
constexpr int kTileRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 2;  // 2 x 4 + 2 + products of 16 registers
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
};
template <>
struct VectorOf<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
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

template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
FASTLSTM_INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // x - 0 is x, -0 and NaN included
}

// a * b + c, rounded once where the ISA can.
// load(p, n): the first n lanes from memory, zeros above. store(p, v, n): the first n lanes only.
// exp2_integral(n): 2^n for an integral n within the exponent range.
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
template <class V>
FASTLSTM_INLINE V exp2_integral(V n) {
  return ldexp(V{} + decltype(n[0] + 0)(1), n);
}
#else
#if defined(__AVX2__) && defined(__FMA__)
FASTLSTM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
FASTLSTM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
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

FASTLSTM_INLINE Vec<float> exp2_integral(Vec<float> n) {
  return (Vec<float>)((__builtin_convertvector(n, Bits<float>) + 127) << 23);
}
FASTLSTM_INLINE Vec<double> exp2_integral(Vec<double> n) {
  // Adding 1.5 * 2^52 leaves n in the low bits; AVX2 has no conversion to 64-bit integers.
  return (Vec<double>)(((Bits<double>)(n + 0x1.8p52) + 1023) << 52);
}
// In two factors, neither of which leaves the exponent range.
template <class V>
FASTLSTM_INLINE V scale_twice(V v, V n, V magic) {
  V half = (n * decltype(n[0] + 0)(0.5) + magic) - magic;
  return v * exp2_integral(half) * exp2_integral(n - half);
}
FASTLSTM_INLINE Vec<float> ldexp(Vec<float> v, Vec<float> n) {
  return scale_twice(v, n, broadcast(0x1.8p23f));
}
FASTLSTM_INLINE Vec<double> ldexp(Vec<double> v, Vec<double> n) {
  return scale_twice(v, n, broadcast(0x1.8p52));
}
#endif

template <class T>
FASTLSTM_INLINE T sum(Vec<T> v) {
  // Halves added to halves: the same order on every call.
  for (int width = lanes<T>() / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) v[l] += v[l + width];
  return v[0];
}
