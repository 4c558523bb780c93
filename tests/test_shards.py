"""Prototypes that are shared out among processes, uneven and none at all: held to one process that has them, value and gradient."""

import numpy as np
import pytest
import torch
from test_distributed import TOLERANCE, assert_close, assert_parts_close, results

from fastsupcon.losses._prototypes import directions
from fastsupcon.rows import wide_rows
from tests.work_of_ranks import SHARES
from tests.work_of_shards import CASES, CLASSES

ACROSS = pytest.mark.parametrize("across", ["gather", "ring"])


@pytest.mark.parametrize("case", CASES)
@ACROSS
@pytest.mark.parametrize("size", SHARES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_as_in_one_process(pool, case, across, size, dtype):
    found = results(pool, size, case, across, dtype, function="work_of_shards.step")
    assert_parts_close(found, TOLERANCE[dtype])


@pytest.mark.parametrize("case", ["psc", "mpsc", "margins"])
@ACROSS
def test_the_same_bits_every_time(pool, case, across):
    assert results(pool, 4, case, across, function="work_of_shards.twice") == [True] * 4


@pytest.mark.parametrize("kind", ["psc", "margins"])
@ACROSS
def test_the_module(pool, kind, across):
    found = results(pool, 4, kind, across, function="work_of_shards.module")
    assert [number for one in found for number in one["own"]] == list(range(CLASSES))
    for one in found:
        assert one["random state"] and one["begins alike"] and one["loads"] and one["loads its own"]
        assert one["losses"][0] == pytest.approx(one["losses"][1], rel=1e-5)
        for got, want in (one["logits"], one["trained alike"]):
            assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("kind", "how", "across", "size", "tolerance"),
    [
        ("psc", "eager", "gather", 4, 1e-5),
        ("margins", "eager", "ring", 4, 1e-5),
        ("margins", "compile", "gather", 3, 1e-5),  # each rank compiles for itself, which takes seconds; one of three has no prototype
        ("psc", "autocast", "ring", 4, 3e-2),
        ("margins", "autocast", "gather", 4, 3e-2),
    ],
)
def test_beside_a_network_under_ddp(pool, kind, how, across, size, tolerance):
    for difference in results(pool, size, kind, how, across, function="work_of_shards.trained"):
        assert difference < tolerance


@pytest.mark.parametrize(("count", "dim"), [(7, 3), (1, 1), (200_003, 17), (70_000, 30)])
def test_directions_are_those_drawn_together(count, dim):
    torch.manual_seed(1)
    want, after = wide_rows(torch.randn(count, dim), unit=True), torch.randn(3)
    for own in range(0, count), range(count // 3, 2 * count // 3), range(count - 1, count), range(0, 0):
        torch.manual_seed(1)
        assert torch.equal(directions(count, dim, own), want[own.start : own.stop])
        assert torch.equal(torch.randn(3), after)


@ACROSS
def test_a_nan_is_seen_everywhere(pool, across):
    assert all(np.isnan(loss) for loss in results(pool, 3, across, function="work_of_shards.with_nan"))


@pytest.mark.parametrize("how", ["ddp", "load"])
def test_copies_are_no_shards(pool, how):
    for error in pool.run("work_of_shards.copied", 3, how):
        assert isinstance(error, ValueError) and str(error).startswith("prototypes of two ranks begin with the same row")


def test_what_is_refused(pool):
    for said in results(pool, 2, function="work_of_shards.refused"):
        expected = [
            "ValueError: sharded=True needs a group, got None",
            "TypeError: sharded must be a bool, got int",
            "ValueError: labels must lie in [0, 4), got values from 1 to 4",
            "ValueError: labels must lie in [0, 4), got values from 1 to 4",
            "ValueError: prototypes must hold at least 2 classes, got 1",
            "ValueError: prototypes must be the same on all ranks of the group, got shards, requires_grad=False on rank 0; [2, 6]",
            "ValueError: class_counts must be finite and not all 0 on all ranks, got a sum of 0",
            "ValueError: class_counts must have shape [2], got [4]",
            "RuntimeError: logits of sharded prototypes have no gradient",
            "ValueError: sharded=True needs a group, got None",
        ]
        for text, begin in zip(said, expected, strict=True):
            assert text.startswith(begin), text
