"""What is chunked's own: many tiles, and nothing read back from a device that is not the CPU."""

import pytest
import torch
from contract import CASES, Case, check, problem, run

from fastsupcon.backends import chunked


@pytest.mark.parametrize("case", [case for case in CASES if case.n > 40], ids=str)
def test_many_tiles(monkeypatch, device, case):
    monkeypatch.setattr(chunked, "TILE", 24)
    check(chunked, case, device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_no_number_back(case):
    """On meta tensors, which have none: reading one is an error."""
    pairs = problem(case, torch.device("cpu"))
    pairs = pairs._replace(**{name: x.to("meta") for name, x in pairs._asdict().items() if isinstance(x, torch.Tensor)})
    terms, _, _, gradients = run(chunked, pairs, case)
    assert terms.rows.shape == (len(case.rows), case.n)
    assert gradients.rows.shape == pairs.rows.shape


def test_memory_is_of_rows_and_tiles():
    """No tensor is larger than the rows, or than five tiles."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, tuple) else (made,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return made

    case = Case(2048, 4096, d=8, keys="few")
    pairs = problem(case, torch.device("cpu"))
    pairs = pairs._replace(**{name: x.to("meta") for name, x in pairs._asdict().items() if isinstance(x, torch.Tensor)})
    with Sizes():
        run(chunked, pairs, case)
    assert largest <= max(5 * chunked.TILE**2, 4096 * 8)
