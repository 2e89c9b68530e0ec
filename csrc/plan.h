// How the work of a pass is cut: a pure function of sizes, threads and the machine's constants.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "lstm.h"

namespace fastlstm {

// Threads form a grid of row_groups x panel_groups over (batch rows, panels of hidden units), one
// rectangle of every step for each. Threads that share batch rows meet at a barrier after each
// step; row groups do not depend on one another within a time block, and whichever thread is free
// takes the next `task` of one. Serial is 1 x 1.
struct Plan {
  int row_groups = 1;
  int panel_groups = 1;
  bool direct = false;      // read the weights where they are instead of packing them
  int64_t across = 0;       // forward, where direct: these rows of the batch across the lanes
  bool row_by_row = false;  // forward, where direct: a batch of one, one row of W at a time
  bool input_in_step =
      false;                 // forward: the input product inside the step, not a product over time
  bool pack_at_use = false;  // forward: each panel of W_ih just before its one product over time
  int64_t block = 1;  // time steps whose input product (or dz) is held at once, and after which a
                      // layer looks at the one below
  int64_t task = 1;   // time steps of a row group that a thread takes at once; all (backward all
                      // of a block) where threads share its rows or there is one group
  double cycles = 0;  // what the cost model says of all steps

  int threads() const { return row_groups * panel_groups; }
};

// What a plan knows of the machine: `lanes`, `strip_depth`, `tile_rows`, `tall_tiles` and
// `panel_cycles` of Kernels<T>, and the bytes of an element of a panel.
struct Machine {
  int64_t lanes, strip_depth, tile_rows;
  bool tall_tiles;
  double cycles;
  double element;
  bool tiles;  // kernels that multiply sums of terms
};

template <class T>
Machine machine_of(const Kernels<T>& kernel) {
  const int64_t columns = kPanelVectors * kernel.lanes;
  return {kernel.lanes,        kernel.strip_depth,
          kernel.tile_rows,    kernel.tall_tiles,
          kernel.panel_cycles, double(kernel.panel_row) * sizeof(T) / double(columns),
          kernel.tile_rows > 1};
}

// The kernels that suit a pass, where there are such; `machine` is that of the plain ones. Of a
// stack, every layer forward, with gradients or without, has the same; so has every number of
// threads.
Use use_forward(const Sizes& sizes, const Machine& machine, bool in_bf16);
Use use_backward(const Sizes& sizes, bool in_bf16);
// For the weight gradients and, of a batch that is not ragged, dx.
Use use_products_backward(const Sizes& sizes, bool in_bf16);

// `block` depends on sizes and machine only, never on `threads`: the sums of the weight gradients
// are cut by it.
Plan plan_forward(const Sizes& sizes, const Machine& machine, int threads);
Plan plan_backward(const Sizes& sizes, const Machine& machine, const Machine& of_products,
                   int threads);

// How many layers, of `sizes` but for the input of the first, run at the same time, each on an
// equal part of the threads and `block` steps of plan_in_wave() behind the one below: 1 if it does
// not pay.
int layers_at_once(const Sizes& sizes, int64_t first_input, const Machine& machine, int layers,
                   int threads);
// The plan of each of them.
Plan plan_in_wave(const Sizes& sizes, const Machine& machine, int threads);

// Part `index` of `parts` nearly equal parts of 0..count: its first and past-the-last element.
inline std::pair<int64_t, int64_t> share(int64_t count, int64_t parts, int64_t index) {
  const int64_t size = count / parts, extra = count % parts;
  const int64_t first = index * size + (index < extra ? index : extra);
  return {first, first + size + (index < extra ? 1 : 0)};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace fastlstm
