// The schedules of the CPU kernels, by themselves: every pair of blocks is visited once, and taken one after another no visit ever waits.
// Exits 1 where that is wrong. Built in test_cpu_portable.py.
#include "cpu/schedule.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <utility>

using fastsupcon::cpu::Schedule;
using fastsupcon::cpu::Turn;
using fastsupcon::cpu::Visit;

namespace {

bool wrong = false;

void expect(bool right, const char* what, std::int64_t row_blocks, std::int64_t column_blocks) {
  if (right) return;
  wrong = true;
  std::printf("%lld x %lld blocks: %s\n", (long long)row_blocks, (long long)column_blocks, what);
}

void check(const Schedule& schedule, bool self, std::int64_t row_blocks, std::int64_t column_blocks) {
  std::set<std::pair<std::int64_t, std::int64_t>> met;
  std::map<std::int64_t, std::int64_t> row_rounds, column_rounds;
  std::map<std::int64_t, std::int64_t>& other_rounds = self ? row_rounds : column_rounds;
  bool in_turn = true, once = true, own_blocks = true;
  const auto take = [&](std::map<std::int64_t, std::int64_t>& rounds, const Turn& turn) {
    in_turn &= rounds[turn.accumulator]++ == turn.round;
  };
  for (std::int64_t task = 0; task < schedule.tasks(); ++task) {
    for (std::int64_t step = 0; step < schedule.steps(); ++step) {
      const Visit visit = schedule.visit(task, step);
      take(row_rounds, visit.rows);
      if (!self || visit.i != visit.j) take(other_rounds, visit.columns);
      if (visit.i >= row_blocks || visit.j >= column_blocks) continue;
      once &= met.emplace(visit.i, visit.j).second && (!self || visit.i <= visit.j);
      const std::int64_t of_row = visit.rows.accumulator, of_column = visit.columns.accumulator;
      own_blocks &= of_row % row_blocks == visit.i && of_row / row_blocks < schedule.row_copies();
      own_blocks &= of_column % column_blocks == visit.j && of_column / column_blocks < schedule.column_copies();
    }
  }
  const std::int64_t pairs = self ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks;
  expect(once && std::int64_t(met.size()) == pairs, "not every pair once", row_blocks, column_blocks);
  expect(in_turn, "a visit before its turn", row_blocks, column_blocks);
  expect(own_blocks, "a sum of another block", row_blocks, column_blocks);
  const std::int64_t most = std::max(row_blocks, column_blocks);
  expect(schedule.row_copies() * row_blocks <= most && schedule.column_copies() * column_blocks <= most, "copies larger than the longer side",
         row_blocks, column_blocks);
}

}  // namespace

int main() {
  for (std::int64_t blocks = 1; blocks < 40; ++blocks) {
    check(Schedule::self(blocks), true, blocks, blocks);
    for (std::int64_t others = 1; others < 40; ++others) check(Schedule::cross(blocks, others), false, blocks, others);
  }
  check(Schedule::cross(1, 1000), false, 1, 1000);
  check(Schedule::cross(1000, 3), false, 1000, 3);
  return wrong;
}
