#include "plan.h"

#include <algorithm>

namespace fastlstm {
namespace {

// Tuning constants. Cycles are of a core with two FMA units; they need to be right within a factor
// of two, since they only rank the grids.
constexpr double kRegionCycles = 12000;  // starting a parallel region and meeting at its end
constexpr double kBarrierCycles = 2500;  // one barrier between two steps, on a machine with company
constexpr double kL2Bytes = 512 << 10;   // what a core's own cache holds beside other things
constexpr double kL2BytesForTiles = 2 << 20;  // for kernels on tiles, whose CPUs have more
constexpr double kNearBytesPerCycle = 32;     // from L2
constexpr double kFarBytesPerCycle = 8;       // from L3 or memory
constexpr double kFarShown = 1.0 / 3;         // of that, what does not hide behind the product
constexpr double kCellCycles = 100;           // gates, c and h of one vector of units
// Threads that share rows wait for the slowest of them at every step; others take tasks from it.
constexpr double kWait = 1.1;
// A task that threads give one another: shorter ones cost more than they balance.
constexpr double kTaskCycles = 80000;
constexpr double kMostTasks = 64;
// Packing the weights does not pay for so few rows (T * N) in so few steps.
constexpr int64_t kDirectSteps = 4;
constexpr int64_t kDirectRowsForward = 32;
constexpr int64_t kDirectRowsBackward = 128;
constexpr int64_t kDirectRowsBf16 = 8;  // where there are kernels for them
// Forward, a batch goes across the lanes where it nearly fills a vector; where tiles are small, and
// more often full along the rows of W, not before it fills so many. Then as many rows (T * N) pay
// as these vectors hold, more where W would be packed from beyond L2 and there are no tiles for it.
constexpr double kAcrossFill = 0.875;
constexpr double kAcrossFew = 1.55;
constexpr int64_t kAcrossVectors = 4;
constexpr int64_t kAcrossVectorsFar = 16;
constexpr double kAcrossFarBytes = 1.5 * (1 << 20);
// Rows that do not nearly fill the last vector go along the rows of W; but W, then read twice, is
// not to come from memory twice.
constexpr double kAcrossTwiceBytes = 12 << 20;
// W as it is comes fastest from L3 and memory as one long run, not four rows at a time: at 4.7 MB
// (H 384) level, from 6.5 MB (H 448) on faster.
constexpr double kRowByRowBytes = 5 << 20;
// The input product belongs in the step, unless so few batch rows share the weights that many times
// at once use them better, and the input is not short either.
constexpr int64_t kBatchInStep = 4;
constexpr int64_t kInputInStep = 8;
// Nor where W_ih would come from memory in every step for few rows: at 13 MB with W_hh (H 650) over
// time won up to 32 rows, at 8 MB (H 512) it lost.
constexpr int64_t kFarBytes = 5 << 20;
constexpr int64_t kFarBatch = 32;
constexpr int64_t kFarSteps = 4;
// Rows of one input product over time, at least: so many that the pass over its weights pays, so
// few that z stays near.
constexpr int64_t kForwardBlockRows = 128;
constexpr int64_t kFarBlockRows = 512;
// The same where the layer above waits for these steps.
constexpr int64_t kWaveBlockRows = 16;
// Smaller weights are as well packed all at once: with 0.8 MB (H 160) two threads lost 5 %.
constexpr double kPackAtUseBytes = 1 << 20;
// Floats go on tiles, which take so many rows and so many columns of W each, where these are mostly
// there: from two tiles of rows on, unless W as terms (of 6 bytes each) stays near. With fewer
// units or cells two threads would lose.
constexpr int64_t kTileBatch = 16;
constexpr int64_t kTileDepth = 32;
constexpr double kTileFill = 0.75;
constexpr int64_t kTileUnitsForward = 48;
constexpr double kTileCellsForward = 1536;
constexpr int64_t kTileUnitsBackward = 96;
constexpr double kTileCellsBackward = 3072;
// The products over time of a backward pass go there from fewer rows of a step on.
constexpr int64_t kTileUnitsOfProducts = 128;
constexpr int64_t kTileBatchOfProducts = 8;
constexpr int64_t kTileRowsOfProducts = 256;
// Layers run at the same time where the model sees this gain. It knows nothing of the other layers'
// weights in the caches: 1000x1x256x256 lost a fifth where it saw 1 %.
constexpr double kClearly = 0.9;

// The work of one time step: a product of depth `depth` into `panels` panels for every batch row,
// and `spread` cycles of other products that split over any threads.
struct StepWork {
  double depth;
  int64_t panels;
  double spread;
};

double step_cycles(const Sizes& s, const Machine& m, const StepWork& work, int rows, int columns) {
  const double batch = double(ceil_div(s.batch, rows));
  const double panels = double(ceil_div(work.panels, columns));
  const double bytes = panels * work.depth * double(4 * m.lanes) * m.element;
  // To and fro through the panels: of each step, what fits is still there from the one before.
  const double near = std::min(bytes, m.tiles ? kL2BytesForTiles : kL2Bytes);
  const double far = (bytes - near) / kFarBytesPerCycle;
  const double reading = near / kNearBytesPerCycle + far;
  const double multiplied = double(ceil_div(ceil_div(s.batch, rows), m.tile_rows) * m.tile_rows);
  const double shown = m.tiles ? 0 : kFarShown * far;  // there it all hides
  const double product = std::max(panels * multiplied * work.depth * m.cycles, reading) + shown;
  const double own = product + panels * batch * kCellCycles + work.spread / (rows * columns);
  return columns > 1 && s.steps > 1 ? kWait * own + kBarrierCycles : own;
}

void choose_grid(const Sizes& s, const Machine& m, const StepWork& work, int threads, Plan* plan) {
  double best = double(s.steps) * step_cycles(s, m, work, 1, 1);
  plan->cycles = best;
  if (best <= kRegionCycles) return;
  for (int columns = 1; columns <= std::min<int64_t>(threads, work.panels); ++columns)
    for (int rows = 1; rows <= std::min<int64_t>(threads / columns, s.batch); ++rows) {
      if (rows * columns == 1) continue;
      // Whole vectors of rows each.
      if (plan->across && rows > 1 && s.batch % (rows * m.lanes) != 0) continue;
      const double cycles =
          double(s.steps) * step_cycles(s, m, work, rows, columns) + kRegionCycles;
      if (cycles < best) {
        plan->cycles = best = cycles;
        plan->row_groups = rows;
        plan->panel_groups = columns;
      }
    }
}

// So many of `steps` steps of a row group that a task is worth it, in whole blocks of `whole`.
int64_t task_steps(const Sizes& s, const Machine& m, StepWork work, const Plan& plan, int64_t steps,
                   int64_t whole) {
  if (plan.row_groups == 1 || plan.panel_groups > 1) return steps;
  work.spread = 0;
  const double worth = kTaskCycles / step_cycles(s, m, work, plan.row_groups, 1);
  const auto wanted = int64_t(std::min(double(steps), std::max(double(steps) / kMostTasks, worth)));
  return std::max<int64_t>(1, wanted / whole) * whole;
}

bool direct(const Sizes& s, int64_t most_rows) {
  return s.steps <= kDirectSteps && s.batch <= most_rows / s.steps;
}

Use use_bf16(const Sizes& s) { return direct(s, kDirectRowsBf16) ? Use::any : Use::bf16; }

bool across(const Sizes& s, const Machine& m, bool far) {
  const int64_t vectors = far ? kAcrossVectorsFar : kAcrossVectors;
  return double(s.batch) >= (m.tall_tiles ? kAcrossFill : kAcrossFew) * double(m.lanes) &&
         direct(s, std::max(kDirectRowsForward, vectors * m.lanes));
}

int64_t rows_across(const Sizes& s, const Machine& m, double weights) {
  const int64_t rest = s.batch % m.lanes;
  const auto lanes = double(m.lanes);
  if (rest == 0 || double(rest) >= kAcrossFill * lanes) return s.batch;
  if (weights <= kAcrossTwiceBytes) return s.batch - rest;
  return double(s.batch) >= kAcrossFew * lanes ? s.batch : 0;
}

bool direct_forward(const Sizes& s, const Machine& m, bool far) {
  return !m.tiles && (direct(s, kDirectRowsForward) || across(s, m, far));
}

// Whether the rows of a step and the `columns` of W that it reads fill the tiles they take, which
// have `whole` columns; a single tile of rows does so only where W stays near.
bool fill_tiles(const Sizes& s, double columns, double whole) {
  const double batch = double(s.batch), rows = double(ceil_div(s.batch, kTileBatch) * kTileBatch);
  const bool near = 24 * double(s.hidden) * whole <= kL2BytesForTiles;
  return s.batch >= kTileBatch + !near && batch * columns >= kTileFill * rows * whole;
}

}  // namespace

Use use_forward(const Sizes& s, const Machine& m, bool in_bf16) {
  if (in_bf16) return use_bf16(s);
  if (direct_forward(s, m, false)) return Use::any;
  const double columns = double(s.input) + double(s.output);
  const int64_t tiles = ceil_div(s.input, kTileDepth) + ceil_div(s.output, kTileDepth);
  const bool pays = s.hidden >= kTileUnitsForward &&
                    double(s.batch) * double(s.hidden) >= kTileCellsForward &&
                    fill_tiles(s, columns, double(tiles * kTileDepth));
  return pays ? Use::floats_on_tiles : Use::any;
}

Use use_backward(const Sizes& s, bool in_bf16) {
  if (in_bf16) return use_bf16(s);
  if (direct(s, kDirectRowsBackward)) return Use::any;
  const double columns = double(s.output);
  const bool pays = s.hidden >= kTileUnitsBackward &&
                    double(s.batch) * double(s.hidden) >= kTileCellsBackward &&
                    fill_tiles(s, columns, columns);
  return pays ? Use::floats_on_tiles : Use::any;
}

Use use_products_backward(const Sizes& s, bool in_bf16) {
  const Use steps = use_backward(s, in_bf16);
  const bool pays = s.hidden >= kTileUnitsOfProducts && s.batch >= kTileBatchOfProducts &&
                    s.batch >= ceil_div(kTileRowsOfProducts, s.steps);
  return steps == Use::any && pays ? Use::floats_on_tiles : steps;
}

Plan plan_forward(const Sizes& s, const Machine& m, int threads) {
  Plan plan;
  const double column = 4 * m.element * double(s.hidden);  // bytes of W
  const double weights = column * (double(s.input) + double(s.output));
  const bool from_far = weights > kAcrossFarBytes;
  plan.direct = direct_forward(s, m, from_far);
  if (plan.direct && across(s, m, from_far)) plan.across = rows_across(s, m, weights);
  plan.row_by_row = plan.direct && s.batch == 1 && weights > kRowByRowBytes;
  const bool far =
      s.batch <= kFarBatch && s.steps >= kFarSteps && column * double(s.input) > double(kFarBytes);
  plan.input_in_step = plan.direct || s.input <= kInputInStep || (s.batch >= kBatchInStep && !far);
  Machine of_step = m;
  if (plan.across) of_step.tile_rows = m.lanes;
  const StepWork work{double(s.output + s.input), ceil_div(s.hidden, m.lanes), 0};
  choose_grid(s, of_step, work, threads, &plan);
  const int64_t rows = far ? kFarBlockRows : kForwardBlockRows;
  const int64_t least = rows / std::max<int64_t>(1, s.batch);
  plan.block = ceil_div(s.steps, s.steps / std::clamp<int64_t>(least, 1, s.steps));
  // Once each, and by one thread; tiles take x as terms, better made for all panels at once.
  plan.pack_at_use = !plan.input_in_step && plan.block == s.steps && plan.row_groups == 1 &&
                     !m.tiles && weights > kPackAtUseBytes;
  plan.task = task_steps(s, of_step, work, plan, s.steps, plan.input_in_step ? 1 : plan.block);
  return plan;
}

Plan plan_in_wave(const Sizes& s, const Machine& m, int threads) {
  Plan plan = plan_forward(s, m, threads);
  plan.block = std::clamp<int64_t>(kWaveBlockRows / std::max<int64_t>(1, s.batch), 1, s.steps);
  plan.pack_at_use = plan.pack_at_use && plan.block == s.steps;
  plan.task = ceil_div(plan.task, plan.block) * plan.block;
  return plan;
}

int layers_at_once(const Sizes& s, int64_t first_input, const Machine& m, int layers, int threads) {
  const int most = std::min(layers, threads);
  if (most < 2) return 1;
  const Plan wave = plan_in_wave(s, m, threads / most);
  const double behind = double((most - 1) * wave.block) / double(s.steps);
  // The first layer, which its wave waits for, in units of the others.
  const double first = std::max(1.0, double(first_input + s.output) / double(s.input + s.output));
  const double waves = double(ceil_div(layers, most)) - 1 + first;
  const double in_waves = waves * (wave.cycles * (1 + behind) + kRegionCycles);
  const double in_turn = (layers - 1 + first) * plan_forward(s, m, threads).cycles;
  return in_waves < kClearly * in_turn ? most : 1;
}

Plan plan_backward(const Sizes& s, const Machine& m, const Machine& of_products, int threads) {
  Plan plan;
  plan.direct = !m.tiles && direct(s, kDirectRowsBackward);
  const double gates = 4 * double(s.hidden);
  const double spread = double(s.batch) * gates * double(2 * s.input + s.output) *
                        of_products.cycles / double(4 * of_products.lanes);
  const StepWork work{gates, ceil_div(s.hidden, 4 * m.lanes), spread};
  choose_grid(s, m, work, threads, &plan);
  plan.block =
      std::clamp<int64_t>(of_products.strip_depth / std::max<int64_t>(1, s.batch), 1, s.steps);
  plan.task = task_steps(s, m, work, plan, plan.block, 1);
  return plan;
}

}  // namespace fastlstm
