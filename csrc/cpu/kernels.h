// What an ISA offers: one table of functions per element type. forward.cpp and backward.cpp call
// nothing else; kernels.inl is the one source behind every table.
//
// A panel is a block of columns of a right-hand matrix B (K, columns) that a tile's registers span:
// four vectors. Products add over k in an order that depends on K alone, so how the work is cut
// into tiles, panels and threads never shows in the bits.
#pragma once

#include "../lstm.h"

namespace fastlstm {

constexpr int kPanelVectors = 4;  // one vector per gate; also the width of a plain panel

// How the four vectors of panel p lie in a row of C (or of the bias).
//   plain:  columns 4*VL*p + v*VL ...      vectors beside one another, of `count` columns
//   gates:  columns VL*p + v*count ...     one vector of units from each gate, of count = H units
struct Columns {
  int64_t count;
  bool gates;
};

// The panels of a matrix B. Row k of panel p starts at at(p) + k * step(p), or the rows around it
// do whose place they share: `panel_depth` of Kernels. A few columns that would take a vector of
// their own may be left out of the tail: as the rows of a matrix, `edge`.
template <class T>
struct Panels {
  const T* data;
  int64_t panel_step;
  int64_t row_step;
  int64_t full;   // panels before the tail
  const T* tail;  // the last panel where it is narrower than four vectors
  int64_t tail_row_step;
  const T* edge = nullptr;  // the last columns: (`edge_columns`, K)
  int64_t edge_step = 0;
  int64_t edge_columns = 0;

  const T* at(int64_t p) const { return p < full ? data + p * panel_step : tail; }
  int64_t step(int64_t p) const { return p < full ? row_step : tail_row_step; }
  bool has_edge(int64_t p) const { return p >= full && edge_columns > 0; }
  // Those of the rows from k on.
  Panels from_row(int64_t k) const {
    Panels rest = *this;
    rest.data += k * row_step;
    rest.tail += k * tail_row_step;
    if (edge) rest.edge += k;
    return rest;
  }
};

// Memory to bring into L2 while tiles are multiplied, some of it with each; `run` and `place` are
// where that has come to.
struct Ahead {
  struct Run {
    const void* data;
    int64_t bytes;
  };
  static constexpr int kRuns = 2 * kPanelVectors;
  Run runs[kRuns];
  int run = 0;
  int64_t place = 0;  // in bytes
};

// C[m][:] = start[:] + sum_k A[m][k] B[k][:]        start: a bias row, or null for zeros
// C[m][:] += sum_k A[m][k] B[k][:]                  with `accumulate`
template <class T>
struct Product {
  Rows<const T> a;
  int64_t depth;  // K
  Panels<T> b;
  Rows<T> c;
  Columns columns;
  const T* start = nullptr;
  bool accumulate = false;
  bool given = false;      // A is x, which may be bfloat16; this and `strip` matter to tiles only
  bool strip = false;      // A is what `transpose` wrote
  T* scratch;              // memory of `scratch_size`
  Ahead* ahead = nullptr;  // what to bring in instead of the next panel of B; not for tiles
};

// One time step for rows n of the batch and units j. Row strides count elements.
//   z = h W_hh^T + start + x W_ih^T, then gates, c and h. A depth of 0 leaves that product out.
// Sums of scalars are in that order; where lanes or tiles are added up in the end, it matters less.
template <class T>
struct StepForward {
  int64_t step;  // odd steps take the panels in descending order
  int64_t hidden;
  int64_t input;        // D, or 0 where `start` already holds the input product
  int64_t output;       // P, the columns of h_prev
  int64_t full;         // panels before a tail (see pack_gates), which step_forward alone takes
  Rows<const T> start;  // (N, 4H); step_n 0 for a bias
  Rows<const T> x;      // (N, D)
  Matrix<T> w_ih;  // gate panels (see pack_gates), or (4H, D) as it is for the two direct steps
  Rows<const T> h_prev;
  Matrix<T> w_hh;  // gate panels, or (4H, P) as it is
  Rows<const T> c_prev;
  Rows<T> c;
  Rows<T> h;
  Rows<T> gates;             // data null: not kept
  Rows<Float16> half_gates;  // or in float16; data null likewise
  bool row_by_row;           // a batch of one, on weights as they are: one row of W at a time
  bool as_distances;         // i, f and o are kept as distance_of() has them: in float16
  T* scratch;                // memory of `scratch_size`
};

// One time step back. dh = grad_y + grad_h + next W, then dz, and dc in place. Without a projection
// next is dz of the next step and W is W_hh; with one they are dL/dh_t and W_hr.
template <class T>
struct StepBackward {
  int64_t step;  // odd steps take the panels in descending order
  int64_t hidden;
  Rows<const T> grad_y;  // data null: zeros
  Rows<const T> grad_h;  // data null: zeros
  Rows<const T> next;    // (N, depth), data null: no such term
  int64_t depth;         // K
  Panels<T> w;           // plain panels
  Rows<const T> gates;
  Rows<const Float16> half_gates;  // in float16 as distances, where gates is null
  Rows<const T> c_prev;
  Rows<const T> c;
  Rows<T> dc;
  Rows<T> dz;
  T* scratch;  // memory of `scratch_size`
};

enum class Function { exp, sigmoid, tanh };

// What kernels are good for: anything; values that are bfloat16 (see Forward::in_bf16); floats
// where there are rows enough.
enum class Use { any, bf16, floats_on_tiles };

template <class T>
struct Kernels {
  int64_t lanes;  // VL
  // Panels in memory: elements of a row of four vectors, and the rows that they hold a multiple of.
  int64_t panel_row, panel_depth;
  bool narrow_end;      // whether the last panel may be narrow: a tail of gates, or an edge
  double panel_cycles;  // of one row of A for one row of a panel
  bool tall_tiles;      // whether a tile has more than four rows
  int64_t tile_rows;    // rows of A are multiplied that many at a time, or as if they were
  // A weight gradient goes in passes of `strip_depth` rows of dz (in float32 their partial sums
  // round better than one long chain) and in strips of `strip_rows` gate rows: a transposed strip
  // stays in L2 while all the panels of x and h go by. It takes `strip_size` elements of memory.
  int64_t strip_rows, strip_depth, strip_size;
  // Elements of memory that a thread needs for so many rows of A of all depths together.
  int64_t (*scratch_size)(int64_t rows, int64_t depth);
  // The same for step_forward_across, of D + P.
  int64_t (*across_size)(int64_t depth);

  // Panels p0 <= p < p1 of W (4H, K) as B = W^T with the gates interleaved, [k][gate][VL], zeros
  // beyond H, to their place in `to`; but those of a tail beside one another: [k][gate][H % VL].
  // True where all numbers are known to be finite.
  bool (*pack_gates)(Matrix<T> w, int64_t hidden, int64_t depth, int64_t p0, int64_t p1,
                     Panels<T> to);
  // Rows k0 <= k < k0 + count of B from b, columns of panels p0 <= p < p1, to their place in `to`.
  void (*pack_rows)(Rows<const T> b, int64_t k0, int64_t count, int64_t columns, int64_t p0,
                    int64_t p1, Panels<T> to);
  // All rows of W (depth, columns) likewise.
  void (*pack_matrix)(Matrix<T> w, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                      Panels<T> to);
  // Panels p0 <= p < p1 of B = W^T to their place in `to`, from W (columns, depth).
  void (*pack_columns)(Matrix<T> w, int64_t depth, int64_t columns, int64_t p0, int64_t p1,
                       Panels<T> to);
  // out[m - m0][k] = a[k][m] for m0 <= m < m1, k < count, `step` between the rows of out; kernels
  // on tiles ignore it and have a layout of their own. The rows of a are evenly spaced, by
  // a.step_n.
  void (*transpose)(Rows<const T> a, int64_t count, int64_t m0, int64_t m1, T* out, int64_t step);
  // out[m] (+)= sum_k a[m][k] for m < rows, k < columns, of what `transpose` wrote with that step.
  void (*sum_rows)(const T* a, int64_t step, int64_t rows, int64_t columns, T* out,
                   bool accumulate);
  // out[m][:] = sum_k a[k][m] b[k][:] for m0 <= m < m1, k < count: a^T b of few rows as they are.
  // The rows of a and b are evenly spaced, by step_n.
  void (*outer)(Rows<const T> a, Rows<const T> b, int64_t count, int64_t columns, int64_t m0,
                int64_t m1, T* out);

  // Rows m0 <= m < m1 of C, panels p0 <= p < p1.
  void (*product)(const Product<T>&, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  // Batch rows n0 <= n < n1; panels of VL units (forward) or 4*VL units (backward).
  void (*step_forward)(const StepForward<T>&, int64_t n0, int64_t n1, int64_t p0, int64_t p1);
  // On weights as they are: for few batch rows, and for so many that they fill the lanes.
  void (*step_forward_direct)(const StepForward<T>&, int64_t n0, int64_t n1, int64_t p0,
                              int64_t p1);
  void (*step_forward_across)(const StepForward<T>&, int64_t n0, int64_t n1, int64_t p0,
                              int64_t p1);
  void (*step_backward)(const StepBackward<T>&, int64_t n0, int64_t n1, int64_t p0, int64_t p1);

  // Numbers in half precision from and to those of T, which is float; rounded to nearest, ties to
  // even.
  void (*widen)(const void* from, Element, int64_t count, T* to);
  void (*narrow)(const T* from, int64_t count, Element, void* to);

  bool (*has_nan)(const T* x, int64_t count);                 // false where x is null
  bool (*finite)(Matrix<T> w, int64_t first, int64_t count);  // of so many elements from one on
  void (*map)(Function, const T* x, T* y, int64_t count);
  // Runs `count` rounds of independent fused multiply-adds in registers; returns the operations
  // done.
  double (*fma_loop)(int64_t count);
};

// The tables, defined by kernels_*.cpp.
namespace generic {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace generic
#ifdef FASTLSTM_X86
namespace avx2 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
// Where tiles.inl compiles: of values that are bfloat16, without tiles and on them, and of any on
// tiles.
extern const Kernels<float> kernels_bf16_dots;
extern const Kernels<float> kernels_bf16;
extern const Kernels<float> kernels_f32_tiles;
}  // namespace avx512
#endif

}  // namespace fastlstm
