"""The losses over several processes, held to one process with all rows: value and gradient, uneven shares, a rank without rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from table import LOSSES

from tests.processes import Pool
from tests.work_of_ranks import SHARES, whole

NAMED = [name for name in LOSSES if name != "scl mask"]  # which names rows by number
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def results(pool: Pool, size: int, *arguments, function="step"):
    return pool.results(function, size, *arguments)


def expected(name, dtype, **options):
    inputs = whole(name, dtype)
    loss = LOSSES[name].ours(*inputs, **LOSSES[name].options | options, backend="cpu")
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return loss.detach().numpy(), [grad.numpy() for grad in torch.autograd.grad(loss.sum(), leaves)]


def assert_close(got, want, tolerance):
    assert got.shape == want.shape
    error = np.abs(got - want).max(initial=0)
    assert error <= tolerance * max(1e-3, np.abs(want).max(initial=0)), (error, np.abs(want).max(initial=0))


def assert_parts_close(found, tolerance):
    """Of each rank what it got and what it should have, the last of which is of all ranks together."""
    for got, want in found:
        for x, y in zip(got[:-1], want[:-1], strict=True):
            assert_close(x, y, tolerance)
    assert_close(sum(got[-1] for got, _ in found), found[0][1][-1], tolerance)


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


@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), {"reduction": "sum"}),
        ((), {"reduction": "none"}),
        ((), {"lone_anchors": "skip"}),
        ((), {"lone_anchors": "skip", "contrast_mode": "one", "reduction": "none"}),
        (("anchor_weights", "class_weights"), {"lone_anchors": "skip", "ignore_index": 3}),
        (("keys",), {"lone_anchors": "skip"}),
        (("keys",), {"beta": 0.5, "denominator": "negatives"}),
    ],
)
def test_options_and_lone_anchors_spread_unevenly(pool, across, given, options):
    for got, want, gradient, wanted in results(pool, 4, across, given, options, function="supcon"):
        assert_close(got, want, 1e-12)
        assert_close(gradient, wanted, 1e-12)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_a_learned_temperature(pool, across):
    found = results(pool, 3, across, function="learned_temperature")
    assert sum(mine for mine, _ in found) / 3 == pytest.approx(found[0][1], rel=1e-12)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_queues_hold_all_ranks_rows(pool, across):
    for steps in results(pool, 4, across, function="with_queue"):
        for got, want in steps:
            assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_a_row_a_rank_however_it_lies_in_memory(pool, across):
    for want, got in results(pool, 4, across, function="of_one_row"):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("across", ["gather", "ring"])
def test_one_row_in_all_meets_the_queue(pool, across):
    for rank, found in enumerate(results(pool, 3, across, function="with_one_row")):
        for number, (loss, gradient) in enumerate(found[:3]):
            mine = rank == 0
            assert found[3 + number] == pytest.approx((loss if mine or number < 2 else 0, gradient if mine else 0), rel=1e-5)


@pytest.mark.parametrize("name", ["scl", "scl several", "bcl", "paco", "infonce keys"])
@pytest.mark.parametrize("across", ["gather", "ring"])
def test_the_same_bits_every_time(pool, name, across):
    assert results(pool, 4, name, across, function="twice_the_same_bits") == [True] * 4


def test_second_derivatives_where_no_rows_travel(pool):
    for found in results(pool, 3, function="penalised"):
        for want, got in zip(found[::2], found[1::2], strict=True):
            assert_close(got, want, 1e-10)


NETWORKS = [(how, across, 3, 1e-5) for how in ("ddp", "fsdp2", "grad_cache") for across in ("gather", "ring")]
NETWORKS += [("compile", "ring", 2, 1e-5), ("autocast", "gather", 3, 3e-2)]  # each rank compiles for itself, which takes seconds


@pytest.mark.parametrize(("how", "across", "size", "tolerance"), NETWORKS)
def test_a_network_has_the_gradient_of_one_process(pool, how, across, size, tolerance):
    for found in results(pool, size, how, across, function="trained"):
        assert found["scl"] < tolerance, found
        assert found["psc"] < tolerance, found


# ---- What goes wrong, on every rank ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("depth", "depth must be the same on all ranks of the group, got 6 on ranks 0, 1; 7 on rank 2"),
        ("dtype", "dtype must be the same on all ranks of the group, got torch.float32 on ranks 0, 1; torch.float64 on rank 2"),
        ("temperature", "temperature must be the same on all ranks of the group, got 0.2 on ranks 0, 1; 0.3 on rank 2"),
        ("reduction", "reduction must be the same on all ranks of the group, got mean on ranks 0, 1; sum on rank 2"),
        ("across", "across must be the same on all ranks of the group, got gather on ranks 0, 1; ring on rank 2"),
        ("loss", "loss must be the same on all ranks of the group, got supcon_loss on ranks 0, 1; nt_xent_loss on rank 2"),
    ],
)
def test_ranks_that_disagree_are_named_on_every_rank(pool, what, message):
    for error in pool.run("disagreeing", 3, what):
        assert isinstance(error, ValueError)
        assert str(error) == message


@pytest.mark.parametrize(
    ("what", "others", "last"),
    [
        ("queue", "0 of 8 rows, training=True", "0 of 8 rows, training=False"),
        ("grad_enabled", "True", "False"),
        ("anchor_weights", "a tensor, requires_grad=True", "a tensor, requires_grad=False"),
        ("class_weights", "a tensor, requires_grad=True", "a tensor, requires_grad=False"),
        ("prototypes", "[4, 6], requires_grad=True", "[4, 6], requires_grad=False"),
        ("class_features", "a tensor, requires_grad=True", "a tensor, requires_grad=False"),
        ("class_counts", "a tensor, requires_grad=False", "None"),
    ],
)
def test_a_rank_that_would_meet_the_others_less_often(pool, what, others, last):
    for error in pool.run("apart", 3, what):
        assert isinstance(error, ValueError)
        assert str(error) == f"{what} must be the same on all ranks of the group, got {others} on ranks 0, 1; {last} on rank 2"


def test_a_rank_that_does_not_come(pool):
    *others, last = pool.run("late", 3, group="short")
    assert last == 0
    for error in others:
        assert isinstance(error, RuntimeError)
        assert re.match(r"fastsupcon: rank [01] of 3 lost the others while supcon_loss, first of all: .* the group's timeout", str(error))
    pool.end()  # its groups are broken


@pytest.mark.parametrize("loss", ["scl", "psc"])
def test_a_backend_that_does_not_serve_is_an_error_without_rows_too(pool, loss):
    for error in pool.run("unserved", 3, loss, group="short"):
        assert isinstance(error, ValueError)
        assert "abacus" in str(error)


def test_a_nan_is_seen_everywhere(pool):
    assert all(np.isnan(loss) for loss in results(pool, 4, function="with_nan"))


def test_lone_anchors_are_an_error_on_every_rank(pool):
    for error in pool.run("lone", 3):
        assert isinstance(error, ValueError)
        assert "got 1 of 9 on all ranks without one" in str(error)


def test_what_is_refused(pool):
    for found in results(pool, 2, function="refused"):
        kinds = [*["ValueError"] * 4, "TypeError", "ValueError", "NotImplementedError", "TypeError"]
        assert [text.split(":")[0] for text in found] == kinds, found
        words = ("mask", "positives", "across='ring' needs a group", "'star'", "int", "none on all 2", "second", "pickled")
        for text, word in zip(found, words, strict=True):
            assert word in text
