// The forward pass: pack the weights, then block by block of time the input product and the steps.
#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
#include "lstm.h"
#include "plan.h"

namespace fastlstm {
namespace {

template <class T>
bool run(const Forward<T>& in, const Plan& plan, const Kernels<T>& kernel) {
  const auto [steps, batch, input, hidden] = in.sizes;
  const int64_t lanes = kernel.lanes;
  const int64_t panels = ceil_div(hidden, lanes);
  const int64_t panel_row = kPanelVectors * lanes;
  const int64_t gates = 4 * hidden;
  const int threads = plan.threads();

  // Time as the recurrence sees it: step s is the s-th in order of computation.
  const auto in_order = [&](auto rows) { return in.layer.reverse ? rows.flipped(steps) : rows; };
  const Rows<const T> x = in_order(in.x);
  const Rows<T> y = in_order(in.y);
  const Rows<T> kept_gates = in_order(Rows<T>{in.gates, batch * gates, gates, batch});
  const Rows<T> kept_cells = in_order(Rows<T>{in.cells, batch * hidden, hidden, batch});
  const Rows<T> c_n{in.c_n, 0, hidden, batch};

  Workspace workspace;
  const int64_t bias_place = workspace.reserve<T>(gates);
  const int64_t ih_place = workspace.reserve<T>(plan.direct ? 0 : panels * input * panel_row);
  const int64_t hh_place = workspace.reserve<T>(plan.direct ? 0 : panels * hidden * panel_row);
  // Training writes the input product where the gates will be kept.
  const bool own_z = !in.gates && !plan.input_in_step;
  const int64_t z_place = workspace.reserve<T>(own_z ? plan.block * batch * gates : 0);
  const int64_t zeros_place = workspace.reserve<T>(in.h0 && in.c0 ? 0 : hidden);
  workspace.allocate();
  // A missing state is one row of zeros, for every row of the batch.
  T* const zeros = workspace.at<T>(zeros_place);
  if (!in.h0 || !in.c0) std::fill_n(zeros, hidden, T(0));
  const auto state = [&, rows = batch, width = hidden](const T* given) {
    return given ? Rows<const T>{given, 0, width, rows} : Rows<const T>{zeros, 0, 0, rows};
  };
  const Rows<const T> h0 = state(in.h0), c0 = state(in.c0);
  T* const bias = workspace.at<T>(bias_place);
  T* const w_ih = workspace.at<T>(ih_place);
  T* const w_hh = workspace.at<T>(hh_place);
  const Rows<T> own{workspace.at<T>(z_place), batch * gates, gates, batch};

  Barrier all;
  std::vector<Barrier> row_group(size_t(plan.row_groups));

  return parallel(threads, [&](int id) {
    const int group = id / plan.panel_groups;
    const auto [n0, n1] = share(batch, plan.row_groups, group);
    const auto [p0, p1] = share(panels, plan.panel_groups, id % plan.panel_groups);

    if (id == 0)
      for (int64_t j = 0; j < gates; ++j)
        bias[j] = (in.layer.b_ih ? in.layer.b_ih[j] : 0) + (in.layer.b_hh ? in.layer.b_hh[j] : 0);
    if (!plan.direct) {
      const auto [from, to] = share(panels, threads, id);
      kernel.pack_gates(in.layer.w_ih, hidden, input, from, to, w_ih);
      kernel.pack_gates(in.layer.w_hh, hidden, hidden, from, to, w_hh);
    }
    all.wait(threads);

    for (int64_t s0 = 0; s0 < steps; s0 += plan.block) {
      const int64_t count = std::min(plan.block, steps - s0);
      const Rows<T> z = own_z ? own : kept_gates.block(s0, 0, batch);
      if (!plan.input_in_step) {
        Product<T> product;
        product.a = x.block(s0, n0, n1 - n0);
        product.depth = input;
        product.b = {w_ih, input * panel_row, panel_row, panels, nullptr, 0};
        product.c = z.block(0, n0, n1 - n0);
        product.columns = {hidden, true};
        product.start = bias;
        product.accumulate = false;
        kernel.product(product, 0, count * (n1 - n0), p0, p1);
      }
      for (int64_t s = s0; s < s0 + count; ++s) {
        StepForward<T> step;
        step.hidden = hidden;
        step.input = plan.input_in_step ? input : 0;
        step.start = plan.input_in_step ? Rows<const T>{bias} : z.block(s - s0, 0, batch);
        step.x = x.block(s, 0, batch);
        step.w_ih = plan.direct ? in.layer.w_ih : w_ih;
        step.w_hh = plan.direct ? in.layer.w_hh : w_hh;
        step.h_prev = s == 0 ? h0 : y.block(s - 1, 0, batch);
        step.c = in.cells ? kept_cells.block(s, 0, batch) : c_n;
        step.c_prev = s == 0     ? c0
                      : in.cells ? Rows<const T>(kept_cells.block(s - 1, 0, batch))
                                 : c_n;
        step.h = y.block(s, 0, batch);
        step.gates = in.gates ? kept_gates.block(s, 0, batch) : Rows<T>{};
        (plan.direct ? kernel.step_forward_direct : kernel.step_forward)(step, n0, n1, p0, p1);
        row_group[size_t(group)].wait(plan.panel_groups);
      }
    }

    const int64_t j0 = p0 * lanes, j1 = std::min(p1 * lanes, hidden);
    for (int64_t n = n0; n < n1; ++n) {
      const T* h = y.at(steps - 1, n);
      std::copy(h + j0, h + j1, in.h_n + n * hidden + j0);
      if (in.cells) {
        const T* c = kept_cells.at(steps - 1, n);
        std::copy(c + j0, c + j1, in.c_n + n * hidden + j0);
      }
    }
  });
}

}  // namespace

template <class T>
void forward(const Forward<T>& args, int threads) {
  if (args.sizes.batch == 0) return;
  const Kernels<T>& kernel = kernels<T>();
  const Machine machine{kernel.lanes, sizeof(T)};
  if (!run(args, plan_forward(args.sizes, machine, threads), kernel))
    run(args, plan_forward(args.sizes, machine, 1), kernel);
}

template void forward(const Forward<float>&, int);
template void forward(const Forward<double>&, int);

}  // namespace fastlstm
