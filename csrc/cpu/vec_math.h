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
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the integer in the lowest bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2Hi = 0x1.63p-1f;  // few bits, so that n * kLn2Hi is exact
  static constexpr float kLn2Lo = -0x1.bd0106p-13f;
  static constexpr float kLowest = -104.0f;    // exp is 0 below
  static constexpr float kHighest = 89.0f;     // exp is inf above
  static constexpr float kSigmoidOne = 30.0f;  // 1 + exp(-x) rounds to 1 above
  static constexpr float kTanhOne = 10.0f;     // tanh rounds to 1 above
  static constexpr float q[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.1227bp-7f,
                                0x1.6bebfep-10f};
};
template <>
struct Exp<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissa = 52, kBias = 1023;
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
};

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int N>
FASTLSTM_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> sum = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) sum = fma(sum, x, broadcast(c[k]));
  return sum;
}

// exp(Factor x) = 2^n (1 + expm1). n is rounded by a sum so large that n plus the exponent's bias
// stand in its lowest bits: one shift from there to scale = 2^(n - Shift).
template <class T>
struct Reduced {
  Vec<T> n;
  Vec<T> scale;
  Vec<T> expm1;
};
template <class T, int Factor, int Shift = 0>
FASTLSTM_INLINE Reduced<T> reduce(Vec<T> x) {
  using E = Exp<T>;
  const Vec<T> round = broadcast(E::kRound + (E::kBias - Shift));
  const Vec<T> biased = fma(x, broadcast(Factor * E::kLog2e), round);
  const Vec<T> n = biased - round;
  // The outer sign goes into the instruction, where one of x before would take its own.
  Vec<T> r = -fma(n, broadcast(E::kLn2Hi), x * T(-Factor));
  r = fma(n, broadcast(-E::kLn2Lo), r);
  const Vec<T> scale = (Vec<T>)((Bits<T>)biased << E::kMantissa);
  return {n, scale, fma(r * r, polynomial<T>(r, E::q), r)};
}

// max error 2 ULP in float32, 3 in float64
template <class T>
FASTLSTM_INLINE Vec<T> exp(Vec<T> x) {
  x = at_least(at_most(x, broadcast(Exp<T>::kHighest)), broadcast(Exp<T>::kLowest));
  const Reduced<T> e = reduce<T, 1>(x);
  return ldexp(e.expm1 + T(1), e.n);
}

// 1 / (1 + exp(-x)), max error 2 ULP in float32, 3 in float64. Both sides of the quotient are
// scaled by a power of two, so that exp(-x) does not overflow and the result is right down to the
// last denormal.
template <class T>
FASTLSTM_INLINE Vec<T> sigmoid(Vec<T> x) {
  constexpr int kShift = Exp<T>::kMantissa + 1;
  const Vec<T> one = broadcast(T(1) / T(int64_t(1) << kShift));
  x = at_least(at_most(x, broadcast(Exp<T>::kSigmoidOne)), broadcast(Exp<T>::kLowest));
  const Reduced<T> e = reduce<T, -1, kShift>(x);
  // 1 + scale (1 + expm1), rounded once where 1 + scale is exact and as good as once elsewhere.
  const Vec<T> high = e.scale + one, low = (e.scale - high) + one;
  return one / (high + fma(e.scale, e.expm1, low));
}

// (1 - exp(-2|x|)) / (1 + exp(-2|x|)), max error 2 ULP in float32, 3 in float64
template <class T>
FASTLSTM_INLINE Vec<T> tanh(Vec<T> x) {
  const Bits<T> sign = (Bits<T>)x & (Bits<T>)broadcast(T(-0.0));
  const Vec<T> abs = at_most((Vec<T>)((Bits<T>)x ^ sign), broadcast(Exp<T>::kTanhOne));
  const Reduced<T> e = reduce<T, -2>(abs);
  const Vec<T> part = fma(-e.scale, e.expm1, T(1) - e.scale);
  const Vec<T> whole = fma(e.scale, e.expm1, T(1) + e.scale);
  return (Vec<T>)((Bits<T>)(part / whole) | sign);
}
