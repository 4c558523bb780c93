"""The integrations over several processes: held to one process with all rows, and to the libraries' own code on the same ranks."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsupcon import functional
from tests import work_of_libraries as work
from tests.work_of_libraries import classes, rows

EVEN = {2: [4, 4], 3: [3, 3, 3]}
UNEVEN = {2: [6, 3], 3: [4, 0, 5]}
SHARES = [*EVEN.values(), *UNEVEN.values()]
uneven_too = pytest.mark.parametrize("counts", SHARES, ids=str)


def installed(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def run(pool, function, counts, *arguments):
    """What each rank has: (value, gradients), or several of them."""
    found = pool.run("of_libraries", len(counts), function, *arguments)
    for one in found:
        if isinstance(one, Exception):
            pool.end()  # another rank may wait for this one
            raise one
    return found


def alone(value, *leaves):
    return value.detach().numpy(), [grad.numpy() for grad in torch.autograd.grad(value, leaves)]


def same(got, want, tolerance=1e-10):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def same_gradients(found, want, tolerance=1e-10):
    """Of rows side by side, and of what every rank has, which is 0-d, in their sum."""
    for of_ranks, wanted in zip(zip(*(grads for _, grads in found), strict=True), want, strict=True):
        same(sum(of_ranks) if wanted.ndim == 0 else np.concatenate(of_ranks), wanted, tolerance)


def whole(found, want):
    """The value on every rank and the gradient are those of one process."""
    for value, _ in found:
        same(value, want[0])
    same_gradients(found, want[1])


# ---- open_clip --------------------------------------------------------------------------------------------------------------------------


def clip_losses(image, text, scale, other_image=None, other_text=None):
    """[N], of each image and text; ``other_``: these as columns."""
    numbers = torch.arange(len(image))
    rows_of = scale * image @ (text if other_text is None else other_text).T
    columns_of = scale * text @ (image if other_image is None else other_image).T
    return (F.cross_entropy(rows_of, numbers, reduction="none") + F.cross_entropy(columns_of, numbers, reduction="none")) / 2


def clip_inputs(counts):
    return rows(sum(counts), 1), rows(sum(counts), 2), work.number(10.0)


def means(losses, counts):
    """Of each rank, so that their average is the mean of all."""
    return [part.sum().item() * len(counts) / len(losses) for part in losses.split(counts)]


@uneven_too
@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_clip(pool, counts, local_loss, gather_with_grad):
    found = run(pool, "clip", counts, "ours", counts, local_loss, gather_with_grad)
    inputs = clip_inputs(counts)
    losses = clip_losses(*inputs)
    same_gradients(found, alone(losses.mean(), *inputs)[1])
    same([value for value, _ in found], means(losses, counts) if local_loss else [losses.mean().item()] * len(counts))


@pytest.mark.parametrize("counts", EVEN.values(), ids=str)
@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_open_clip(pool, counts, local_loss, gather_with_grad):
    """What the docstring says of open_clip's four ways: its value is ours, its gradient the whole one, a part of it or a share."""
    theirs = run(pool, "clip", counts, "theirs", counts, local_loss, gather_with_grad)
    ours = run(pool, "clip", counts, "ours", counts, local_loss, gather_with_grad)
    image, text, scale = clip_inputs(counts)
    of_image, of_text, of_scale = alone(clip_losses(image, text, scale).mean(), image, text, scale)[1]
    if not gather_with_grad and local_loss:
        as_rows = clip_losses(image, text, scale, image.detach(), text.detach()).mean()
        part = alone(as_rows, image, text)[1]
        assert np.abs(part[0] - of_image).max() > 0.1 * np.abs(of_image).max()
        of_image, of_text = part
    elif not gather_with_grad:
        of_image, of_text = of_image / len(counts), of_text / len(counts)
    same_gradients(theirs, [of_image, of_text, of_scale])
    same([value for value, _ in ours], [value for value, _ in theirs])
    if gather_with_grad:
        for mine, other in zip(ours, theirs, strict=True):
            for got, want in zip(mine[1][:2], other[1][:2], strict=True):
                same(got, want)


@uneven_too
@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_in_distributed_data_parallel(pool, counts, local_loss):
    tower = work.tower()
    clip_losses(*tower(rows(sum(counts), 1), rows(sum(counts), 2))).mean().backward()
    for grads in run(pool, "clip_in_ddp", counts, counts, local_loss):
        for got, parameter in zip(grads, tower.parameters(), strict=True):
            same(got, parameter.grad)


def test_clip_of_another_world(pool):
    for rank, world_size in ((0, 3), (2, 2)):
        for got in pool.run("of_libraries", 2, "wrong_clip", rank, world_size):
            assert isinstance(got, ValueError)
            assert "as torch.distributed's default group says, got" in str(got)


# ---- lightly ----------------------------------------------------------------------------------------------------------------------------


@uneven_too
def test_lightly(pool, counts):
    views = rows(sum(counts), 0), rows(sum(counts), 1)
    found = run(pool, "lightly_ntxent", counts, "ours", counts, 0, 1)
    whole([steps[0] for steps in found], alone(functional.nt_xent_loss(*views, temperature=0.2), *views))


@pytest.mark.parametrize("counts", EVEN.values(), ids=str)
@pytest.mark.parametrize("batches", [0, 3])
def test_lightlys_own(pool, counts, batches):
    """Its gradients on each rank, and of its values the average; with a bank of three batches of all ranks, which is written over."""
    bank = batches * sum(counts)
    ours, theirs = (run(pool, "lightly_ntxent", counts, whose, counts, bank, 5) for whose in ("ours", "theirs"))
    for step in range(5):
        average = np.mean([steps[step][0] for steps in theirs])
        for mine, other in zip(ours, theirs, strict=True):
            same(mine[step][0], average)
            for got, want in zip(mine[step][1], other[step][1], strict=True):
                same(got, want)


@uneven_too
def test_lightly_supcon(pool, counts):
    views = rows(sum(counts), 1), rows(sum(counts), 2)
    want = functional.supcon_loss(torch.cat(views), classes(sum(counts)).repeat(2), temperature=0.2, normalize=True)
    whole(run(pool, "lightly_supcon", counts, counts), alone(want, *views))


# ---- sentence-transformers --------------------------------------------------------------------------------------------------------------

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKING = {
    "default": (2, {}),
    "negatives": (3, {}),
    "symmetric": (3, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
    "all": (3, {"directions": DIRECTIONS}),
    "hard": (3, {"directions": DIRECTIONS, "hardness_mode": "hard_negatives", "hardness_strength": 3.0}),
    "all harder": (3, {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 3.0}),
}


@pytest.mark.parametrize("name", RANKING)
def test_sentence_transformers(pool, name):
    """Value and gradients of each rank are the library's. On two ranks, as each has to import it."""
    installed("sentence_transformers")
    counts, (columns, options) = [4, 4], RANKING[name]
    for cached in (False, True):
        ours, theirs = (run(pool, "ranking", counts, whose, counts, columns, options, cached) for whose in ("ours", "theirs"))
        for mine, other in zip(ours, theirs, strict=True):
            same(mine[0], other[0])
            for got, want in zip(mine[1], other[1], strict=True):
                same(got, want)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("counts", [[6, 3], [0, 5]], ids=str)
def test_sentence_transformers_in_one_process(pool, name, counts):
    """Of unlike numbers of queries: the average of the values, and the gradient."""
    installed("sentence_transformers")
    from fastsupcon.integrations.sentence_transformers import MultipleNegativesRankingLoss

    columns, options = RANKING[name]
    texts = [rows(sum(counts), seed) for seed in range(columns)]
    want = alone(MultipleNegativesRankingLoss(None, **options).compute_loss_from_embeddings(texts), *texts)
    found = run(pool, "ranking", counts, "ours", counts, columns, options, False)
    same(np.mean([value for value, _ in found]), want[0])
    same_gradients(found, want[1])


@pytest.mark.parametrize("counts", [[4, 4], [6, 3], [0, 5]], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_sentence_supcon(pool, counts, cached):
    installed("sentence_transformers")
    x = rows(sum(counts), 1)
    want = functional.supcon_loss(x, classes(sum(counts)), temperature=0.2, normalize=True)
    whole(run(pool, "sentence_supcon", counts, counts, cached), alone(want, x))


# ---- pytorch-metric-learning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", EVEN.values(), ids=str)
@pytest.mark.parametrize(("efficient", "memory"), [(False, 0), (True, 0), (False, 12)], ids=["all", "efficient", "memory"])
def test_wrapped_by_the_library(pool, counts, efficient, memory):
    """In its DistributedLossWrapper our loss is the library's: R times the loss, and its whole gradient; with ``efficient`` not."""
    installed("pytorch_metric_learning")
    from pytorch_metric_learning import losses

    ours, theirs = (run(pool, "wrapped", counts, whose, counts, efficient, memory) for whose in ("ours", "theirs"))
    for mine, other in zip(ours, theirs, strict=True):
        for got, want in zip(mine, other, strict=True):
            same(got[0], want[0])
            same(got[1][0], want[1][0])
    if not memory:
        x, labels = rows(sum(counts), 1), classes(sum(counts), seed=1)
        value, (gradient,) = alone(losses.SupConLoss(0.2)(x, labels), x)
        got = np.concatenate([steps[0][1][0] for steps in ours])
        if efficient:
            assert np.abs(got - gradient).max() > 0.1 * np.abs(gradient).max()
        else:
            same(got, gradient)
            same([steps[0][0] for steps in ours], [len(counts) * value] * len(counts))


@uneven_too
@pytest.mark.parametrize("across", ["gather", "ring"])
@pytest.mark.parametrize("case", ["themselves", "others", "memory", "lone"])
def test_metric_learning(pool, counts, across, case):
    installed("pytorch_metric_learning")
    if case == "memory":
        counts = [max(1, count) for count in counts]  # the library's takes no batch of no rows
    from pytorch_metric_learning import losses, reducers

    for reducer in ("AvgNonZeroReducer", "MeanReducer"):
        found = run(pool, "metric_learning", counts, counts, across, reducer, case)
        temperature = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        loss = losses.SupConLoss(temperature, reducer=getattr(reducers, reducer)())
        memory = losses.CrossBatchMemory(loss, work.DEPTH, 12 * len(counts))
        for step, seed in enumerate((1, 2)):
            x, labels = rows(sum(counts), seed), classes(sum(counts), seed=seed)
            others, others_labels = rows(sum(counts), 5), classes(sum(counts), seed=5)
            if case == "others":
                want = alone(loss(x, labels, ref_emb=others, ref_labels=others_labels), x, others, temperature)
            elif case == "memory":
                want = alone(memory(x, labels), x, temperature)
            else:
                labels = torch.arange(sum(counts)) if case == "lone" else labels
                want = alone(loss(x, labels) + 0 * temperature, x, temperature)
            whole([steps[step] for steps in found], want)


REFUSED = {
    "lists": "indices_tuple must be None or AllPairs with a group, got lists of pairs",
    "memory": "indices_tuple must be None or AllPairs with a group, got lists of pairs",
    "reducer": "reducer must not be a ClassWeightedReducer with a group",
    "no rows": "embeddings must have a row for the memory at least, got none",
}


@pytest.mark.parametrize(("case", "text"), REFUSED.items())
def test_metric_learning_refuses(pool, case, text):
    installed("pytorch_metric_learning")
    for got in pool.run("of_libraries", 2, "metric_learning_refuses", case):
        assert isinstance(got, ValueError)
        assert text in str(got)
