// Threads for one call. They are started and joined by the call itself: nothing outlives it, so a fork in between, several calling threads at
// once and an interpreter that exits are all harmless. A start costs about 10 µs, so callers ask for threads only when there is work.
//
// Which thread does which task is left to chance; that the result does not depend on it is the callers' duty.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace fastsupcon::cpu {

// Yields the core after a short while of polling.
class Backoff {
 public:
  void pause();

 private:
  int polls_ = 0;
};

class Team {
 public:
  // Runs work(team, member) in `threads` threads, the calling one among them as member 0. With fewer if the system gives no more.
  static void run(int threads, const std::function<void(Team&, int member)>& work);

  int size() const { return size_.load(std::memory_order_relaxed); }

  // All members call it: task(0), …, task(count − 1) are started in this order, each by one member. Returns when all are done.
  template <class Task>
  void each(std::int64_t count, const Task& task) {
    for (std::int64_t t = next_.fetch_add(1); t < count; t = next_.fetch_add(1)) task(t);
    wait_for_all();
  }

 private:
  void wait_for_all();

  std::atomic<int> size_{0};  // 0 until it is known how many threads there are
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> arrived_{0};
  std::atomic<int> meetings_{0};
};

}  // namespace fastsupcon::cpu
