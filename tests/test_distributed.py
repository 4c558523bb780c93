"""The losses over several processes, held to one process with all rows: value and gradient, uneven shares, a rank without rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from table import LOSSES

from tests.processes import Pool
from tests.work_of_ranks import SHARES, whole

NAMED = [name for name in LOSSES if name != "scl mask"]  # which names rows by number
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.end()


def results(pool: Pool, size: int, *arguments, **options):
    found = pool.run("step", size, *arguments, **options)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def expected(name, dtype, **options):
    inputs = whole(name, dtype)
    loss = LOSSES[name].ours(*inputs, **LOSSES[name].options | options, backend="cpu")
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return loss.detach().numpy(), [grad.numpy() for grad in torch.autograd.grad(loss.sum(), leaves)]


def assert_close(got, want, tolerance):
    assert got.shape == want.shape
    error = np.abs(got - want).max(initial=0)
    assert error <= tolerance * max(1e-3, np.abs(want).max(initial=0)), (error, np.abs(want).max(initial=0))


def check(found, name, dtype, **options):
    loss, grads = expected(name, dtype, **options)
    row = LOSSES[name]
    replicated = 1 if name == "bcl" or row.has_prototypes else None
    for one in found:
        assert_close(one["loss"], loss, TOLERANCE[dtype])
    for number, want in enumerate(grads):
        of_ranks = [one["grads"][number] for one in found]
        got = sum(of_ranks) if number == replicated else np.concatenate(of_ranks)
        assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("size", SHARES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_as_in_one_process(pool, name, across, size, dtype):
    check(results(pool, size, name, dtype, across, {}), name, dtype)
