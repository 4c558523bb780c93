#include "team.h"

#include <algorithm>
#include <cfenv>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __GLIBC__
#include <dlfcn.h>
#include <pthread.h>
#endif

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

std::int64_t Team::Shared::claim(std::int64_t round, std::int64_t count) {
  std::int64_t now = position.load();
  for (;;) {
    const std::int64_t task = now - (round << kTaskBits);  // count or more in a later round
    if (task >= count) return -1;
    if (position.compare_exchange_weak(now, now + 1)) return task;
  }
}

void Team::Shared::finish(std::int64_t round, std::int64_t count) {
  if (done.fetch_add(1) + 1 < count) return;
  done.store(0);
  position.store((round + 1) << kTaskBits);
}

// No exception may pass through the frames of a thread's start or of an OpenMP runtime.
void Team::Shared::take_part(int member) noexcept {
  try {
    Team team(*this);
    work(team, member);
  } catch (...) {
    if (!failed.exchange(true)) failure = std::current_exception();
  }
}

void Team::Shared::run_on_own_threads() {
  std::vector<std::thread> others;
  others.reserve(size - 1);
  for (int member = 1; member < size; ++member) {
    try {
      others.emplace_back([this, member] { take_part(member); });
    } catch (const std::system_error&) {
      break;
    }
  }
  take_part(0);
  for (std::thread& other : others) other.join();
}

namespace {

// What is called of an OpenMP runtime. libgomp has these functions, and libomp and libiomp5 have them for programs that GCC has compiled.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // null if no runtime is to be used
  int (*max_threads)();
  int (*num_threads)();
  int (*thread_num)();
  const char* library;
};
constexpr OpenMP kNoOpenMP{};

#ifdef __GLIBC__

// The dynamic linker bound torch's own calls in this order: to what all libraries see (a runtime in LD_PRELOAD), then to what torch brings.
template <class Function>
bool bind(void* torch, const char* name, Function*& function) {
  void* symbol = dlsym(RTLD_DEFAULT, name);
  if (!symbol) symbol = dlsym(torch, name);
  function = reinterpret_cast<Function*>(symbol);
  return symbol;
}

OpenMP find_openmp() {
  OpenMP found{};
  void* const torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  const bool complete = torch && bind(torch, "GOMP_parallel", found.parallel) && bind(torch, "omp_get_max_threads", found.max_threads) &&
                        bind(torch, "omp_get_num_threads", found.num_threads) && bind(torch, "omp_get_thread_num", found.thread_num);
  Dl_info info;
  if (!complete || !dladdr(reinterpret_cast<void*>(found.parallel), &info)) return kNoOpenMP;
  found.library = info.dli_fname;
  return found;
}

// Whether this process is a fork that has not called exec: Linux's PF_FORKNOEXEC, in the seventh field after the name in parentheses.
bool is_fork() {
  std::ifstream file("/proc/self/stat");
  std::string stat, field;
  std::getline(file, stat);
  std::istringstream fields(stat.substr(stat.rfind(')') + 1));
  for (int i = 0; i < 7; ++i) fields >> field;
  return std::strtoul(field.c_str(), nullptr, 10) & 0x40;
}

// A fork has no thread but the one that called it. libgomp does not see that, and would wait for ever for the threads of the parent. So a
// fork gets threads of its own, be it made after this library was loaded or before.
std::atomic<bool> forked{is_fork()};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

const OpenMP& openmp() {
  if (forked.load()) return kNoOpenMP;
  static const OpenMP found = find_openmp();  // at the first call, when torch is loaded
  return found;
}

#else

const OpenMP& openmp() { return kNoOpenMP; }

#endif

}  // namespace

// Inside a parallel region the runtime gives one thread unless it was told to nest regions, as it gives torch's operators: the other cores
// have their work already.
void Team::Shared::run_on_torch_threads() {
  struct Region {
    Shared& shared;
    std::fenv_t environment;  // the caller's. Whether denormals are flushed, say, must not depend on which thread does a task.
  } region{*this, {}};
  std::fegetenv(&region.environment);
  const auto body = [](void* data) {
    const auto& [shared, environment] = *static_cast<const Region*>(data);
    const int members = std::min(shared.size, openmp().num_threads()), member = openmp().thread_num();
    if (member >= members) return;
    std::fenv_t before;
    std::fegetenv(&before);
    std::fesetenv(&environment);
    shared.take_part(member);
    std::fesetenv(&before);
    // At the region's end libgomp's threads poll and never yield; a late one may need the core of one of them.
    shared.left.fetch_add(1);
    for (Backoff backoff; shared.left.load() < members;) backoff.pause();
  };
  // All of torch's threads, even if not all take part: at a smaller region libgomp ends the threads that are left over, and starts new ones
  // at torch's next operator.
  openmp().parallel(body, &region, unsigned(std::max(size, openmp().max_threads())), 0);
}

void Team::run(int threads, const Work& work) {
  Shared shared{threads, work};
  if (threads > 1 && openmp().parallel) {
    shared.run_on_torch_threads();
  } else {
    shared.run_on_own_threads();
  }
  if (shared.failure) std::rethrow_exception(shared.failure);
}

std::string team_runtime() {
  if (!openmp().parallel) return "threads of its own";
  const std::string path = openmp().library;
  return "torch's OpenMP threads (" + path.substr(path.rfind('/') + 1) + ")";
}

}  // namespace fastsupcon::cpu
