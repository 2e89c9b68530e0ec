// Threads on Chains and Shares of csrc/cpu/parallel.h: see test_parallel.py.
#include "../csrc/cpu/parallel.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

using namespace fastlstm;

namespace {

template <class F>
void run(int threads, F&& f) {
  std::vector<std::thread> all;
  for (int id = 0; id < threads; ++id) all.emplace_back(f, id);
  for (std::thread& thread : all) thread.join();
}

// Some work; of every fourth thread much more, and now and then a thread that loses its core.
void work(int id, std::minstd_rand* random) {
  const auto steps = (*random)() % 64 * (id % 4 == 3 ? 20 : 1);
  for (volatile unsigned k = 0; k < steps; k = k + 1) {
  }
  if ((*random)() % 100 == 0) sched_yield();
}

void expect(bool held, const char* what) {
  if (held) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Every task of every chain is run once, in order, in phases with a barrier between.
void chains(int threads, int count, int64_t tasks) {
  Chains chains(count);
  Barrier barrier;
  std::vector<int64_t> next(size_t(count), 0);  // plain: the chains order what is written
  run(threads, [&](int id) {
    std::minstd_rand random(unsigned(id + 1));
    Chains::Place place{size_t(id % count)};
    for (int64_t past : {tasks, tasks, 2 * tasks + 1}) {
      for (int64_t task; (task = chains.take(&place, past)) >= 0; chains.done(&place)) {
        expect(next[place.chain] == task, "a task is not the next of its chain");
        work(id, &random);
        next[place.chain] = task + 1;
      }
      barrier.wait(threads);
      for (int64_t each : next) expect(each == past, "tasks are left");
      barrier.wait(threads);
    }
  });
}

// Every item is taken once, again and again.
void shares(int threads, int64_t items) {
  Shares shares(threads);
  Barrier barrier;
  std::vector<int> taken(size_t(items), 0);  // plain: an item is one thread's between barriers
  run(threads, [&](int id) {
    std::minstd_rand random(unsigned(id + 1));
    for (int round = 1; round <= 50; ++round) {
      shares.open(id, items * id / threads, items * (id + 1) / threads);
      for (int64_t item; (item = shares.take(id)) >= 0; ++taken[size_t(item)]) work(id, &random);
      barrier.wait(threads);
      for (int each : taken) expect(each == round, "an item was not taken once");
      barrier.wait(threads);
    }
  });
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 8})
    for (int64_t tasks : {1, 5, 200}) {
      chains(threads, threads, tasks);
      chains(threads, threads + 2, tasks);
    }
  for (int threads : {1, 2, 5})
    for (int64_t items : {0, 1, 7, 64}) shares(threads, items);
}
