#include "team.h"

#include <system_error>
#include <thread>
#include <vector>

namespace fastsupcon::cpu {

void Backoff::pause() {
  if (++polls_ < 256) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    std::this_thread::yield();
  }
}

void Team::wait_for_all() {
  const int meeting = meetings_.load();
  if (arrived_.fetch_add(1) + 1 == size_.load()) {
    arrived_.store(0);
    next_.store(0);
    meetings_.store(meeting + 1);
  } else {
    for (Backoff backoff; meetings_.load() == meeting;) backoff.pause();
  }
}

void Team::run(int threads, const std::function<void(Team&, int)>& work) {
  Team team;
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int member = 1; member < threads; ++member) {
    try {
      others.emplace_back([&team, &work, member] {
        for (Backoff backoff; team.size_.load() == 0;) backoff.pause();
        work(team, member);
      });
    } catch (const std::system_error&) {
      break;
    }
  }
  team.size_.store(int(others.size()) + 1);
  work(team, 0);
  for (std::thread& other : others) other.join();
}

}  // namespace fastsupcon::cpu
