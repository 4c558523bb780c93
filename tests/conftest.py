"""What the tests share: where they run, and the backends they run over.

Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before Triton is first imported.
"""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from fastsupcon.backends import BACKENDS
from tests.interpreter import spare_repetitions
from tests.processes import Pool

if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores; tests of threads set their number themselves
    torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def serves(backend: str, dtype: torch.dtype, depth: int = 8) -> bool:
    return BACKENDS[backend].unusable(DEVICE, dtype, depth) is None


def assert_same(got: torch.Tensor, want: torch.Tensor, *leaves: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Values, and the gradients of their sums."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for x, y in zip(*(torch.autograd.grad(value.sum(), leaves, retain_graph=True) for value in (got, want)), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def built_once(tmp_path_factory, name: str, build) -> Path:
    """A folder that build(folder) fills: once a session, for all of xdist's processes."""
    import fcntl

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not (folder / "built").exists():
            folder.mkdir(exist_ok=True)
            build(folder)
            (folder / "built").touch()
    return folder


@pytest.fixture(scope="session")
def pool():
    """Processes with gloo, started where first needed."""
    processes = Pool()
    yield processes
    processes.end()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(BACKENDS))
def backend(request) -> str:
    """Each backend in turn that serves fp32 rows here."""
    reason = BACKENDS[request.param].unusable(DEVICE, torch.float32, 8)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


def pytest_collection_modifyitems(items):
    """What takes longest starts first, or one process ends with it alone while the others have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup(item):
    """Not at once: not every process of tests interprets kernels, and Triton takes a second to import."""
    if "triton" in item.nodeid and not torch.cuda.is_available():
        spare_repetitions()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n``, a process that has no tests left takes half of another's: by default each is given more than it may have time for."""
    if config.getvalue("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)
    return None
