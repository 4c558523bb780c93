"""self_logsumexp and cross_logsumexp over several processes: values, and gradients of rows, columns, biases and the scale."""

import pytest
import torch
from test_distributed import TOLERANCE, assert_parts_close, results

from tests.work_of_ranks import SHARES


@pytest.mark.parametrize("which", ["self", "cross", "skip", "labels"])
@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("size", SHARES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_as_in_one_process(pool, which, across, size, dtype):
    found = results(pool, size, which, across, dtype, function="work_of_logsumexp.logsumexp")
    assert_parts_close(found, TOLERANCE[dtype])


def test_one_row_in_all_has_nobody_to_meet(pool):
    for values, grads in results(pool, 3, function="work_of_logsumexp.one_row"):
        assert (values == -torch.inf).all() and (grads == 0).all()


def test_what_is_refused(pool):
    for too_far, alone in results(pool, 2, function="work_of_logsumexp.refused"):
        assert too_far == "ValueError: skip must lie in [-1, 6), got values from 6 to 6"
        assert alone.startswith("ValueError: across='ring' needs a group")
