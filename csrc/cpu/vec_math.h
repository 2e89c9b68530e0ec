// exp, sigmoid and tanh on vectors, over the whole line: infinities, NaN and denormals included.
// Included only by kernels.inl. tests/test_math.py sweeps the stated errors on every ISA.
//
// One reduction serves all three: x = n ln 2 + r with |r| <= ln 2 / 2, and expm1(r) = r + r^2 q(r).
// q is the minimax (float32) or Chebyshev (float64) fit of (expm1(r) - r) / r^2 on that interval.

template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float kRound = 0x1.8p23f;  // x + kRound - kRound rounds x to an integer
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2Hi = 0x1.63p-1f;  // few bits, so that n * kLn2Hi is exact
  static constexpr float kLn2Lo = -0x1.bd0106p-13f;
  static constexpr float kLowest = -104.0f;  // exp is 0 below
  static constexpr float kHighest = 89.0f;   // exp is inf above
  static constexpr float kTanhOne = 10.0f;   // tanh rounds to 1 above
  static constexpr float q[] = {0x1.fffffep-2f, 0x1.5554bp-3f, 0x1.555674p-5f, 0x1.1227bp-7f,
                                0x1.6bebfep-10f};
};
template <>
struct Exp<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2Hi = 0x1.62e4p-1;
  static constexpr double kLn2Lo = 0x1.7f7d1cf79abcap-20;
  static constexpr double kLowest = -746.0;
  static constexpr double kHighest = 710.0;
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

template <class T>
struct Reduced {
  Vec<T> n;      // integral
  Vec<T> expm1;  // exp(r) - 1
};

template <class T>
FASTLSTM_INLINE Reduced<T> reduce(Vec<T> x) {
  using E = Exp<T>;
  constexpr int degree = sizeof(E::q) / sizeof(T) - 1;
  const Vec<T> magic = broadcast(E::kRound);
  Vec<T> n = fma(x, broadcast(E::kLog2e), magic) - magic;
  Vec<T> r = fma(n, broadcast(-E::kLn2Hi), x);
  r = fma(n, broadcast(-E::kLn2Lo), r);
  Vec<T> q = broadcast(E::q[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) q = fma(q, r, broadcast(E::q[k]));
  return {n, fma(r * r, q, r)};
}

// A NaN passes both: the comparison fails and x stays.
template <class V>
FASTLSTM_INLINE V at_most(V x, V bound) {
  return bound < x ? bound : x;
}
template <class V>
FASTLSTM_INLINE V at_least(V x, V bound) {
  return x < bound ? bound : x;
}

template <class T>
FASTLSTM_INLINE Vec<T> sign_bit(Vec<T> x) {
  return (Vec<T>)((Bits<T>)x & (Bits<T>)broadcast(T(-0.0)));
}
template <class T>
FASTLSTM_INLINE Vec<T> flip_sign(Vec<T> x, Vec<T> sign) {
  return (Vec<T>)((Bits<T>)x ^ (Bits<T>)sign);
}

// max error 2 ULP (float32 and float64)
template <class T>
FASTLSTM_INLINE Vec<T> exp(Vec<T> x) {
  x = at_least(at_most(x, broadcast(Exp<T>::kHighest)), broadcast(Exp<T>::kLowest));
  Reduced<T> e = reduce<T>(x);
  return ldexp(e.expm1 + T(1), e.n);
}

// 1 / (1 + exp(-x)), max error 2 ULP. Through exp(-|x|), which cannot overflow; for negative x the
// quotient keeps its relative accuracy down to the last denormal.
template <class T>
FASTLSTM_INLINE Vec<T> sigmoid(Vec<T> x) {
  Vec<T> minus_abs = (Vec<T>)((Bits<T>)x | (Bits<T>)broadcast(T(-0.0)));
  Reduced<T> r = reduce<T>(at_least(minus_abs, broadcast(Exp<T>::kLowest)));
  Vec<T> e = ldexp(r.expm1 + T(1), r.n);
  return (x < T(0) ? e : broadcast(T(1))) / (e + T(1));
}

// max error 2 ULP. tanh|x| = m / (m + 2) with m = expm1(2|x|) = 2^n expm1(r) + (2^n - 1), where
// nothing cancels: for tiny x n is 0 and m keeps the relative accuracy of expm1(r).
template <class T>
FASTLSTM_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> sign = sign_bit<T>(x);
  Vec<T> twice = at_most(flip_sign<T>(x, sign), broadcast(Exp<T>::kTanhOne));
  twice = twice + twice;
  Reduced<T> r = reduce<T>(twice);
  Vec<T> scale = exp2_integral(r.n);
  Vec<T> m = fma(r.expm1, scale, scale - T(1));
  return flip_sign<T>(m / (m + T(2)), sign);
}
