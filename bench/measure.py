"""One contender in a process of its own: of a case its peak memory, its errors against float64, then timed runs whenever the parent asks.

So every contender has the environment it needs, speed and memory share one setup, and the parent interleaves the contenders' runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from fastsupcon.backends._extension import SCALARS
from fastsupcon.backends._extension import module as extension
from tests import naive

from .contenders import CONTENDERS, Case, Loss
from .report import AFTER, BOTH

REFERENCE = "reference"  # computes the loss and its gradients in float64, once a case
PRODUCT = "product"  # beside the contenders, a product at the highest rate this machine has at this moment
NAIVE_ROWS = 4096  # up to here the reference is the naive loss in float64,
CHUNKED_ROWS = {"cpu": 16384, "cuda": 65536}  # to here the chunked backend in float64,
ANCHORS = 256  # and above naive again, for so many of the rows
BLOCK = 2**27  # similarities that PSC's reference holds at once: 1 GiB a matrix in float64
TURN = {"cpu": 0.1, "cuda": 0.02}  # seconds of runs a contender makes when its turn comes, at least one
ANSWER = {"cpu": 3600, "cuda": 60}  # seconds a worker has for one answer, its start and its compiling included
LEAKS = "ignore::UserWarning:multiprocessing.resource_tracker"  # what a process that is killed leaves is cleaned up, in silence
JOIN = 5  # seconds it has to end by itself
KEPT = 4 * 2**30  # bytes of a GPU that a worker may keep cached while the others take their turns,
GRAPH = 1 / 8  # and the share of a GPU that its graph may, which gives nothing back


# ---------------------------------------------------------------------------------------------------------------- what a process does


def serve(name: str, device: str, pipe: Connection) -> None:
    """Answer each request with ("ok", answer) or ("failed", reason).

    "prepare" comes with a case and the file of its reference; then "check" asks for the errors, and a mode for seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends this process when it has written its results
    steps: dict[str, Callable[[], object]] = {}
    cold = False
    while True:
        request, *arguments = pipe.recv()
        try:
            if request == "prepare":
                case, reference = arguments
                loss, steps = None, {}
                forget(device)
                loss, steps, answer = prepare(case, name, reference)
            elif request == "check":
                answer = errors(case, loss, torch.load(reference))
            else:
                answer = timed(steps[request], device, cold, parallel_operator if request == AFTER else None)
            reply = "ok", answer
        except Exception as error:  # a contender that fails is a result
            reply = "failed", one_line(error)
        with contextlib.suppress(RuntimeError):  # of a GPU that failed, which the reply says already
            cold = released(device)
        pipe.send(reply)


def forget(device: str) -> None:
    """What the case before left: tensors, its graph's memory, and compiled code, of which a function may have only so many versions."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def released(device: str) -> bool:
    """Whether so much was cached that it went back to the GPU: the next step allocates it anew."""
    if device != "cuda" or torch.cuda.memory_reserved() <= KEPT:
        return False
    torch.cuda.empty_cache()
    return True


def prepare(case: Case, name: str, reference: Path) -> tuple[Loss | None, dict[str, Callable[[], object]], dict | None]:
    """The loss, what is timed by mode, and what is to be told of both."""
    torch.set_num_threads(case.threads)
    if name == PRODUCT:
        step, answer = product(case)
        return None, {"product": step}, answer
    if name == REFERENCE:
        return None, {}, torch.save(float64_reference(case), reference)
    contender = CONTENDERS[name]
    loss = contender.build(case)
    inputs = case.inputs()
    leaves = differentiable(inputs)

    def forward() -> Tensor:
        return loss(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*inputs), leaves)

    if contender.compiles:
        both()
    else:  # loads libraries, but leaves nothing of this size behind
        small = Case(case.loss, 32, case.depth, min(case.prototypes, 32), case.dtype, device=case.device).inputs()
        loss(*small).backward()
        del small
    answer = {"extra_bytes": extra_bytes(both, case.device)}
    steps = {"forward": forward, BOTH: both, AFTER: both}
    if case.device == "cuda":
        kept = answer["extra_bytes"] / torch.cuda.get_device_properties(0).total_memory
        try:
            if kept <= GRAPH:
                steps["graph"] = captured(both)
            else:
                answer["failed"] = {"graph": f"would keep {kept:.0%} of the GPU's memory from the others, more than {GRAPH:.1%}"}
        except RuntimeError as error:
            answer["failed"] = {"graph": one_line(error)}
    return loss, steps, answer


def product(case: Case) -> tuple[Callable[[], object], dict]:
    """On a CPU our own micro-kernel with its operands in L1, on each thread; on a GPU torch.mm."""
    dtype = getattr(torch, case.dtype)
    if case.device == "cpu":

        def run() -> float:
            return extension.cpu.micro_kernel(SCALARS[dtype], 20_000, case.threads)

        return run, {"what": "the micro-kernel in L1", "flops": 2 * run()}
    a = torch.randn(8192, 8192, device=case.device).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a.T, out=out), {"what": "torch.mm, 8192³", "flops": 2 * 8192**3}


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph: what it costs without the host."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ------------------------------------------------------------------------------------------------------------------------------- time


def timed(step: Callable[[], object], device: str, cold: bool = False, before: Callable[[], object] | None = None) -> list[float]:
    """Seconds of each of the runs in one turn; ``cold``: after one that is not timed. Nor is ``before``, which runs before each."""
    seconds = []
    if cold:
        step()
    end_of_turn = time.perf_counter() + TURN[device]
    while not seconds or time.perf_counter() < end_of_turn:
        if before:
            before()
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return seconds


def parallel_operator() -> None:
    """A product on all of torch's threads, as any layer of a network before a loss: they go on spinning when it has ended."""
    a, out = _operands()
    torch.mm(a, a, out=out)


@functools.cache
def _operands() -> tuple[Tensor, Tensor]:
    return torch.ones(512, 512), torch.empty(512, 512)


# ----------------------------------------------------------------------------------------------------------------------------- memory


def extra_bytes(step: Callable[[], object], device: str) -> int | None:
    """Peak of one step over what was there before it (the inputs), its gradients included; on the CPU by the kernel's high-water mark."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):  # glibc: free pages go back, or the step would reuse them unseen
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------------------------------- correctness


def float64_reference(case: Case) -> list[Tensor]:
    """Loss and gradients in float64 of the inputs as they are after rounding to the case's dtype."""
    inputs = [x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x for x in case.inputs()]
    if case.loss in ("psc", "psc all"):
        return psc_by_blocks(case, *inputs)
    if case.rows <= NAIVE_ROWS:
        loss = CONTENDERS["naive"].build(case)(*inputs)
    elif case.rows <= CHUNKED_ROWS[case.device] or case.loss != "scl":
        loss = CONTENDERS["chunked"].build(case)(*inputs)
    else:  # the first ANCHORS rows against all: as the first views of as many samples, which the labels' period allows
        features, labels = inputs
        views = features.unflatten(0, (-1, ANCHORS)).transpose(0, 1)
        loss = naive.supcon_loss(views, labels[:ANCHORS], **case.options, contrast_mode="one", reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, differentiable(inputs))]


def differentiable(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in inputs if x is not None and x.requires_grad]


def psc_by_blocks(case: Case, features: Tensor, labels: Tensor, prototypes: Tensor) -> list[Tensor]:
    """Loss and gradients as the sum over blocks of rows, each of which is independent of the others."""
    loss, size = torch.zeros((), dtype=torch.float64, device=features.device), max(1, BLOCK // len(prototypes))
    for first in range(0, len(features), size):
        rows = slice(first, first + size)
        block = naive.psc_loss(features[rows], labels[rows], prototypes, **case.options, reduction="sum") / len(features)
        block.backward()
        loss += block.detach()
    return [loss, features.grad, prototypes.grad]


def errors(case: Case, loss: Loss, reference: list[Tensor]) -> dict[str, float]:
    """|L - L64| / |L64|, and the largest |dX - dX64| / |dX64| (Frobenius) over the leaves."""
    inputs = case.inputs()
    if case.loss == "scl" and case.rows > CHUNKED_ROWS[case.device]:
        value = loss(*inputs, reduction="none")[:ANCHORS].sum()
    else:
        value = loss(*inputs)
    found = [value, *torch.autograd.grad(value, differentiable(inputs))]
    value_error, *gradient_errors = (
        float((x.detach().double() - exact).norm() / exact.norm()) for x, exact in zip(found, reference, strict=True)
    )
    return {"value_error": value_error, "gradient_error": max(gradient_errors)}


# -------------------------------------------------------------------------------------------------------------- the parent's end of it


class Ended(RuntimeError):
    """The worker failed at what it was asked, or its process ended."""


class Worker:
    """A process that runs :func:`serve`. ``failed``: it gave a failure for an answer, after which its GPU may not be what it was."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.limit, self.failed = ANSWER[device], False
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(name, device, other), daemon=True)
        quiet = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), LEAKS]))
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": quiet,
            **(CONTENDERS[name].environment if name in CONTENDERS else {}),
        }
        with _environment(environment), _uninterrupted():
            self.process.start()
        other.close()

    def ask(self, *request: object):
        self.send(*request)
        return self.receive()

    def send(self, *request: object) -> None:
        self.deadline = time.monotonic() + self.limit
        with contextlib.suppress(OSError):  # receive tells it
            self.pipe.send(request)

    def receive(self):
        try:
            if not self.pipe.poll(max(self.deadline - time.monotonic(), 0)):
                self.end()
                raise Ended(f"no answer in {self.limit} s")
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(JOIN)
            self.end()
            raise Ended(f"its process ended with exit code {self.process.exitcode} (killed for memory?)") from None
        if status == "failed":
            self.failed = True
            raise Ended(answer)
        return answer

    def end(self) -> None:
        self.process.kill()  # before its pipe is closed, of which it would complain
        self.pipe.close()
        self.process.join(JOIN)  # not for good: a driver that hangs keeps even a killed process

    @property
    def ended(self) -> bool:
        return self.pipe.closed


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process begun here gets no interrupt, also not before it has come to say so: it is for the parent, whom it reaches afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
