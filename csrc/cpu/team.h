// The threads of one call: those that torch's operators run on where its OpenMP runtime is found in the process, else threads that the call
// itself starts and joins. After an operator torch's threads poll for its next one for some milliseconds, and would hold the cores that
// threads of ours need: SCL of 512 rows with two threads took three times as long after a matrix product as alone.
//
// Nothing here links torch or an OpenMP runtime. Several calling threads at once, a fork at any time and an interpreter that exits are
// harmless. Which thread does which task is left to chance; that the result does not depend on it is the callers' duty.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

namespace fastsupcon::cpu {

// Yields the core after a short while of polling.
class Backoff {
 public:
  void pause();

 private:
  int polls_ = 0;
};

// What one member of a team sees of it.
class Team {
 public:
  // Runs work(team, member) in `threads` threads, the calling one among them as member 0; with fewer if the system gives no more. What a
  // member throws is thrown again here, the first of several, when all have ended.
  static void run(int threads, const std::function<void(Team&, int member)>& work);

  // How many members were asked for.
  int size() const { return shared_.size; }

  // All members call it: task(0), …, task(count − 1) are started in this order, each by one member. Returns when all are done. Nobody waits
  // for a member that comes late, woken from sleep or kept from its core by another process: it finds its share done.
  template <class Task>
  void each(std::int64_t count, const Task& task) {
    if (count <= 0) return;
    const std::int64_t round = round_++;
    for (std::int64_t t = shared_.claim(round, count); t >= 0; t = shared_.claim(round, count)) {
      task(t);
      shared_.finish(round, count);
    }
    wait([&] { return shared_.round() != round; });
  }

  // Returns once ready() holds, which another member brings about. Ends this member's work if another one's has failed.
  template <class Ready>
  void wait(const Ready& ready) const {
    for (Backoff backoff; !ready(); backoff.pause()) {
      if (shared_.failed.load(std::memory_order_relaxed)) throw Abandoned{};
    }
  }

 private:
  using Work = std::function<void(Team&, int)>;
  struct Abandoned {};

  struct Shared {
    const int size;
    const Work& work;
    std::atomic<std::int64_t> position{0};  // the round, that is which call of each(), · 2⁴⁰ + its next task
    std::atomic<std::int64_t> done{0};      // tasks of this round
    std::atomic<int> left{0};               // members that have nothing more to do
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};  // of the member that set `failed`

    static constexpr int kTaskBits = 40;
    std::int64_t round() const { return position.load() >> kTaskBits; }
    std::int64_t claim(std::int64_t round, std::int64_t count);  // the next task of this round, or −1
    void finish(std::int64_t round, std::int64_t count);
    void take_part(int member) noexcept;
    void run_on_own_threads();
    void run_on_torch_threads();
  };

  explicit Team(Shared& shared) : shared_(shared) {}

  Shared& shared_;
  std::int64_t round_ = 0;  // of this member's next call of each()
};

// Which threads a call gets in this process, for people to read.
std::string team_runtime();

}  // namespace fastsupcon::cpu
