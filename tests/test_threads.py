"""The threads of the CPU kernels (csrc/cpu/team.h): torch's own ones where they can be had, and the same bits on any."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastsupcon
from fastsupcon.backends._extension import missing

ROOT = Path(__file__).resolve().parent.parent
needs_extension = pytest.mark.skipif(missing is not None, reason=str(missing))
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
SECONDS = 60  # after which a process counts as hung


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Enough work for several threads, and few enough elements (below 2**15) that torch's own operators, which hang in a fork, keep to one.
def step(seed: int = 0, rows: int = 1600, depth: int = 20) -> bytes:
    """The bits of a loss and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, depth, generator=generator).requires_grad_()
    labels = torch.randint(10, (rows,), generator=generator)
    loss = fastsupcon.SupConLoss(backend="cpu")(z, labels)
    loss.backward()
    return loss.detach().numpy().tobytes() + z.grad.numpy().tobytes()


def parallel_operator() -> None:
    torch.ones(1 << 20).exp()


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 3, 4 * (os.cpu_count() or 1)])
def test_same_bits_on_any_number_of_threads(threads):
    parallel_operator()
    expected = step()
    torch.set_num_threads(threads)
    for _ in range(3):
        parallel_operator()
        assert step() == expected


@needs_extension
def test_several_calling_threads():
    expected = [step(seed) for seed in range(4)]

    def work(seed):
        torch.set_num_threads(2)
        parallel_operator()
        return [step(seed) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [[bits] * 5 for bits in expected]


def _answer(end) -> None:
    torch.set_num_threads(2)
    end.send_bytes(step())
    end.close()


def in_a_fork() -> bytes:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_answer, args=(there,))
    child.start()
    try:
        assert here.poll(SECONDS), "the fork hangs"
        return here.recv_bytes()
    finally:
        child.kill()
        child.join()


@needs_extension
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_of_a_process_that_ran_parallel_operators():
    parallel_operator()
    expected = step()
    assert [in_a_fork(), in_a_fork()] == [expected, expected]
    assert step() == expected  # and the parent goes on


# The fork of a fork, by os.fork alone.
@needs_extension
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_os_fork_twice():
    script = """
import os, sys
import test_threads as t
t.torch.set_num_threads(2)
t.parallel_operator()
expected = t.step()
for generation in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    assert t.step() == expected
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=SECONDS)


@needs_extension
@needs_fork
def test_imported_only_after_the_fork():
    script = """
import os, torch
torch.set_num_threads(2)
torch.ones(1 << 20).exp()
child = os.fork()
if child:
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status))
import test_threads
test_threads.step()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=SECONDS)


@needs_extension
def test_a_call_at_the_interpreters_end():
    script = """
import atexit, test_threads as t
t.torch.set_num_threads(2)
t.parallel_operator()
expected = t.step()
atexit.register(lambda: print(t.step() == expected))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=SECONDS, capture_output=True, text=True)
    assert done.stdout == "True\n"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONWARNINGS": "ignore::DeprecationWarning"}


# torch's threads were there before the caller chose what becomes of denormals.
@needs_extension
def test_denormals_are_treated_as_in_the_calling_thread():
    def bits() -> bytes:
        z = (torch.arange(1600.0 * 20).reshape(1600, 20).sin()).requires_grad_()
        loss = fastsupcon.SupConLoss(backend="cpu", reduction="none")(z, torch.arange(1600) % 10)
        loss.backward(torch.full_like(loss, 1e-38))
        return z.grad.numpy().tobytes()

    parallel_operator()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        torch.set_num_threads(1)
        expected = bits()
        torch.set_num_threads(2)
        assert all(bits() == expected for _ in range(5))
    finally:
        torch.set_flush_denormal(False)
    assert bits() != expected  # so there was something to flush


PROBE = r"""
#include <stdexcept>
#include "cpu/team.h"
using fastsupcon::cpu::Team;

// Whether what member `thrower` throws arrives, while the others wait for a task that it had or for what it was to bring about.
extern "C" int failure_arrives(int threads, int thrower) {
  std::atomic<bool> never{false};
  std::atomic<int> present{0};
  try {
    Team::run(threads, [&](Team& team, int member) {
      present.fetch_add(1);
      team.wait([&] { return present.load() == threads; });
      if (member == thrower) throw std::runtime_error("thrown by a member");
      team.each(1000, [&](std::int64_t task) { if (task == 500) team.wait([&] { return never.load(); }); });
    });
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}

// Rounds of tasks, some empty; the tasks that were done, each once and after those of the round before, or −1.
extern "C" std::int64_t tasks_done(int threads, int rounds) {
  std::atomic<std::int64_t> done{0};
  std::atomic<bool> wrong{false};
  Team::run(threads, [&](Team& team, int) {
    std::int64_t before = 0;
    for (int round = 0; round < rounds; ++round) {
      const int count = round % 7;
      team.each(count, [&](std::int64_t) { wrong = wrong || done.fetch_add(1) < before; });
      before += count;
      wrong = wrong || done.load() < before;
    }
  });
  return wrong ? -1 : done.load();
}

extern "C" std::int64_t nested(int threads) {
  std::atomic<std::int64_t> done{0};
  Team::run(threads, [&](Team& team, int) {
    team.each(4, [&](std::int64_t) {
      Team::run(threads, [&](Team& inner, int) { inner.each(5, [&](std::int64_t) { done.fetch_add(1); }); });
    });
  });
  return done.load();
}

extern "C" int on_torch_threads() { return fastsupcon::cpu::team_runtime().rfind("torch's OpenMP threads", 0) == 0; }
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("not installed: c++")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE)
    sources = [ROOT / "csrc/cpu/team.cpp", folder / "probe.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread", f"-I{ROOT}/csrc", *sources, "-o"]
    done = subprocess.run([*command, folder / "probe.so"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "probe.so"


def check_team(probe: str) -> bool:
    """Whether teams run on torch's threads, after they have been found to work."""
    team = ctypes.CDLL(probe)
    team.tasks_done.restype = team.nested.restype = ctypes.c_int64
    for threads in (1, 2, 3, 8):
        assert [team.failure_arrives(threads, thrower) for thrower in range(threads)] == [1] * threads
        assert team.tasks_done(threads, 2000) == sum(r % 7 for r in range(2000))
        assert team.nested(threads) == 20
    return bool(team.on_torch_threads())


def test_team_on_torch_threads(probe):
    parallel_operator()
    if not check_team(str(probe)):
        pytest.skip("torch's OpenMP runtime was not found")


@needs_fork
def test_team_on_threads_of_its_own(probe):
    script = f"""
import os, sys, test_threads
if os.fork():  # which gives the child threads of its own
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
assert not test_threads.check_team({str(probe)!r})
"""
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, timeout=SECONDS)
