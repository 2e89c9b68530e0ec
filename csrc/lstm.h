// The whole C++ interface of fastlstm: layers of an LSTM, in one or both directions, on raw
// pointers.
//
// Legend
//   T  time steps    N  batch    D  input size    H  hidden size
//   P  columns of h: proj_size, or H without a projection
//   Gates stand in the order i f g o of torch.nn.LSTM: row g*H + j of a (4H, .) matrix is gate g of
//   unit j.
//
//     z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
//     i, f, o = sigmoid(z_i, z_f, z_o)    g = tanh(z_g)
//     c_t = f * c_{t-1} + i * g           h_t = o * tanh(c_t), or W_hr (o * tanh(c_t))
//
// (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000.)
//
// Nothing here checks its arguments: the Python layer has done so. Arrays that are written never
// overlap arrays that are read, nor one another. Results have the same bits for any `threads`.
#pragma once

#include <cstdint>

namespace fastlstm {

// Rows of a (T, N, columns) array whose last dimension is contiguous; row m = t * batch + n.
// Strides count elements and may be zero or negative. Without `batch` a plain matrix: batch = 1.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t step_t = 0;
  int64_t step_n = 0;
  int64_t batch = 1;

  T* at(int64_t t, int64_t n) const { return data + t * step_t + n * step_n; }
  T* row(int64_t m) const { return batch == 1 ? at(m, 0) : at(m / batch, m % batch); }
  // The same rows, time running backwards.
  Rows flipped(int64_t steps) const {
    return {data + (steps - 1) * step_t, -step_t, step_n, batch};
  }
  // `count` rows of the batch from n, at times t, t + 1, ...
  Rows block(int64_t t, int64_t n, int64_t count) const {
    return {at(t, n), step_t, step_n, count};
  }
  operator Rows<const T>() const { return {data, step_t, step_n, batch}; }
};

// Numbers in half precision, as they lie in memory.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
enum class Element { full, float16, bfloat16 };

// A contiguous row-major matrix of T, or, where T is float, of either half precision.
template <class T>
struct Matrix {
  const void* data = nullptr;
  Element element = Element::full;

  const T* full() const { return static_cast<const T*>(data); }
  int64_t element_size() const { return element == Element::full ? sizeof(T) : sizeof(Float16); }
  explicit operator bool() const { return data; }
};

struct Sizes {
  int64_t steps;   // T >= 1
  int64_t batch;   // N >= 0
  int64_t input;   // D >= 1
  int64_t hidden;  // H >= 1
  int64_t output;  // P >= 1, H without a projection
};

// Sequences of different lengths, the longest first, as in torch's PackedSequence: the arrays over
// time have no padding, so their shapes begin with the number of all rows instead of T and N.
struct Ragged {
  const int64_t* rows = nullptr;   // (T) rows of the batch at step s in order of computation;
                                   // null: all sequences have T steps
  const int64_t* first = nullptr;  // (T) the first of these rows in an array over time
};

// What both passes read of the layer.
template <class T>
struct Layer {
  Matrix<T> w_ih;  // (4H, D)
  Matrix<T> w_hh;  // (4H, P), of the same elements
  const T* b_ih;   // (4H) or null
  const T* b_hh;   // (4H) or null
  Matrix<T> w_hr;  // (P, H), or null: no projection
  bool reverse;    // time runs from T-1 to 0
};

template <class T>
struct Forward {
  Sizes sizes;
  bool in_bf16;  // float: x and the weights are numbers of bfloat16; products may count on it
  Ragged ragged;
  Layer<T> layer;
  Rows<const T> x;      // (T, N, D)
  const T* h0;          // (N, P) or null: zeros
  const T* c0;          // (N, H) or null: zeros
  Rows<T> y;            // (T, N, P)  h_t, at the time of x_t
  T* h_n;               // (N, P) or null
  T* c_n;               // (N, H)
  T* gates;             // (T, N, 4, H) i f g o after their activations, or null: keep nothing
  Float16* half_gates;  // the same in float16, as the kernels keep them, instead of gates
  T* cells;             // (T, N, H) c_t, or null
  T* raw;               // (T, N, H) o * tanh(c_t), or null; kept with a projection only
};

// Gradients of a scalar loss. A null output is not computed.
template <class T>
struct Backward {
  Sizes sizes;
  bool in_bf16;  // float: x, h0, y, raw and the weights are numbers of bfloat16, likewise
  Ragged ragged;
  Layer<T> layer;
  Rows<const T> x;            // (T, N, D)
  const T* h0;                // (N, P) or null: zeros
  const T* c0;                // (N, H) or null: zeros
  Rows<const T> y;            // (T, N, P)      as the forward pass left it; not read where T is 1
  const T* gates;             // (T, N, 4, H)   likewise, or null and
  const Float16* half_gates;  // the same in float16, as the forward pass left it
  const T* cells;             // (T, N, H)      likewise
  const T* raw;               // (T, N, H)      likewise; null without a projection
  Rows<const T> grad_y;       // (T, N, P), data null: zeros
  const T* grad_h;            // (N, P) or null: zeros
  const T* grad_c;            // (N, H) or null: zeros
  Rows<T> dx;                 // (T, N, D), data may be null
  T* dw_ih;                   // (4H, D) or null
  T* dw_hh;                   // (4H, P) or null
  T* db;                      // (4H) or null: the gradient of either bias
  T* dw_hr;                   // (P, H) or null
  T* dh0;                     // (N, P) or null
  T* dc0;                     // (N, H) or null
  T* dz;                      // (N, 4H) of a single step: dL/dz_t is left there. Where gates and
                              // half_gates are null it is read, and of the gradients only those of
                              // the weights follow. Or null.
};

// threads >= 1 is the most that may be used. Throw std::bad_alloc and nothing else.

// Runs layers; the directions of each stand one after the other. All have the same sizes, but for D
// of the first, and the same `ragged`. Of more than one layer nothing is kept, and y of all but the
// last, x of all but the first are not read: forward() has memory of its own for them.
template <class T>
void forward(const Forward<T>* passes, int layers, int directions, int threads);
// Runs the one or two directions of a layer.
template <class T>
void backward(const Backward<T>* directions, int count, int threads);

}  // namespace fastlstm
