// exp, sigmoid and tanh on vectors, over the whole line: infinities, NaN and denormals included.
// Included only by kernels.inl. tests/test_math.py sweeps the stated errors on every ISA.
//
// One reduction serves all three: x = n ln 2 + r with |r| <= ln 2 / 2, and expm1(r) = r + r^2 q(r).
// q is the minimax (float32) or Chebyshev (float64) fit of (expm1(r) - r) / r^2 on that interval.
// The worst errors come from where a result lies just below a power of two; the order of the sums
// below is chosen for that.

template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float kBiased = 0x1.8p23f + 127;  // see Reduced
  static constexpr int kMantissa = 23;
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2Hi = 0x1.63p-1f;  // few bits, so that n * kLn2Hi is exact
  static constexpr float kLn2Lo = -0x1.bd0106p-13f;
  static constexpr float kLowest = -104.0f;    // exp is 0 below
  static constexpr float kHighest = 89.0f;     // exp is inf above
  static constexpr float kSigmoidOne = 30.0f;  // 1 + exp(-x) rounds to 1 above
  static constexpr float kTanhOne = 10.0f;     // tanh rounds to 1 above
  static constexpr float q[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.1227bp-7f,
                                0x1.6bebfep-10f};
  static constexpr float tanh[] = {-0x1.555554p-2f, 0x1.110feap-3f, -0x1.b99feep-5f, 0x1.5d1deap-6f,
                                   -0x1.b11612p-8f};
};
template <>
struct Exp<double> {
  static constexpr double kBiased = 0x1.8p52 + 1023;
  static constexpr int kMantissa = 52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2Hi = 0x1.62e4p-1;
  static constexpr double kLn2Lo = 0x1.7f7d1cf79abcap-20;
  static constexpr double kLowest = -746.0;
  static constexpr double kHighest = 710.0;
  static constexpr double kSigmoidOne = 45.0;
  static constexpr double kTanhOne = 20.0;
  static constexpr double q[] = {0x1p-1,
                                 0x1.5555555555557p-3,
                                 0x1.5555555555556p-5,
                                 0x1.11111111100cep-7,
                                 0x1.6c16c16c162ccp-10,
                                 0x1.a01a01abef415p-13,
                                 0x1.a01a01a6dcaffp-16,
                                 0x1.71de021a90822p-19,
                                 0x1.27e4db57442fbp-22,
                                 0x1.af4e196027428p-26,
                                 0x1.1f731ea5352cap-29};
  static constexpr double tanh[] = {
      -0x1.5555555555555p-2,  0x1.1111111111109p-3,  -0x1.ba1ba1ba1a705p-5,  0x1.664f48822d60dp-6,
      -0x1.226e353973fdep-7,  0x1.d6d3c5ee500bfp-9,  -0x1.7da25c3bd077bp-10, 0x1.3547ad42a2cc7p-11,
      -0x1.f41bde30ad0c5p-13, 0x1.8c8d808d1d698p-14, -0x1.1accbc7e7ff2p-15,  0x1.0809ea9dc2203p-17};
};

// exp(x) = 2^n (1 + expm1). n comes as biased = kBiased + n, a sum so large that it rounds n to an
// integer and leaves n + the exponent bias in its lowest bits: one shift from there to 2^n.
template <class T>
struct Reduced {
  Vec<T> biased;
  Vec<T> expm1;
};
template <class T>
FASTLSTM_INLINE Vec<T> exp2_biased(Vec<T> biased) {
  return (Vec<T>)((Bits<T>)biased << Exp<T>::kMantissa);
}

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int N>
FASTLSTM_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> sum = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) sum = fma(sum, x, broadcast(c[k]));
  return sum;
}

template <class T>
FASTLSTM_INLINE Reduced<T> reduce(Vec<T> x) {
  using E = Exp<T>;
  const Vec<T> biased = fma(x, broadcast(E::kLog2e), broadcast(E::kBiased));
  const Vec<T> n = biased - broadcast(E::kBiased);
  Vec<T> r = fma(n, broadcast(-E::kLn2Hi), x);
  r = fma(n, broadcast(-E::kLn2Lo), r);
  return {biased, fma(r * r, polynomial<T>(r, E::q), r)};
}

// max error 2 ULP
template <class T>
FASTLSTM_INLINE Vec<T> exp(Vec<T> x) {
  x = at_least(at_most(x, broadcast(Exp<T>::kHighest)), broadcast(Exp<T>::kLowest));
  const Reduced<T> e = reduce<T>(x);
  return ldexp(e.expm1 + T(1), e.biased - broadcast(Exp<T>::kBiased));
}

// 1 / (1 + exp(-x)), max error 2 ULP. Where exp(-x) would overflow, a power of two moves into the
// numerator, so the quotient is right down to the last denormal.
template <class T>
FASTLSTM_INLINE Vec<T> sigmoid(Vec<T> x) {
  x = at_least(at_most(x, broadcast(Exp<T>::kSigmoidOne)), broadcast(Exp<T>::kLowest));
  const Reduced<T> e = reduce<T>(-x);
  const Vec<T> kept = at_most(e.biased, broadcast(Exp<T>::kBiased + 100));
  const Vec<T> scale = exp2_biased<T>(kept);
  // 1 + scale (1 + expm1), rounded once where 1 + scale is exact and as good as once elsewhere.
  const Vec<T> high = scale + T(1), low = (scale - high) + T(1);
  const Vec<T> denominator = high + fma(scale, e.expm1, low);
  return exp2_biased<T>(kept - e.biased + Exp<T>::kBiased) / denominator;
}

// max error 2 ULP. |x| < 0.55: x + x^3 t(x^2), t the Chebyshev fit; beyond: 1 - 2 / (1 +
// exp(2|x|)).
template <class T>
FASTLSTM_INLINE Vec<T> tanh(Vec<T> x) {
  const Bits<T> sign = (Bits<T>)x & (Bits<T>)broadcast(T(-0.0));
  const Vec<T> abs = (Vec<T>)((Bits<T>)x ^ sign);
  const Vec<T> square = abs * abs;
  const Vec<T> small = fma(abs * square, polynomial<T>(square, Exp<T>::tanh), abs);
  const Vec<T> bounded = at_most(abs, broadcast(Exp<T>::kTanhOne));
  const Reduced<T> e = reduce<T>(bounded + bounded);
  const Vec<T> scale = exp2_biased<T>(e.biased);
  const Vec<T> large = T(1) - T(2) / fma(scale, e.expm1, scale + T(1));
  return (Vec<T>)((Bits<T>)(abs < T(0.55) ? small : large) | sign);
}
