"""The examples run, and show what they say; GRACE's loss is NT-Xent."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastsupcon import functional
from tests.processes import Script

ROOT = Path(__file__).parent.parent
HANGS = 300  # seconds; an example takes less than a minute on two cores that are free
ON_LINUX = sys.platform == "linux"  # where the examples measure memory


def printed(name: str, *arguments: str) -> str:
    run = Script(ROOT / "examples" / name, *arguments, apart=True)
    text, errors = run.communicate(timeout=HANGS)
    assert run.returncode == 0, errors
    return text


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number) for number in found.groups()]


def test_graph_nodes():
    """Its memory is that of 10,000 nodes, a quarter of the arithmetic."""
    text = printed("graph_nodes.py", "10_000")
    value, chance = numbers(r"loss of 2,000 nodes: ([\d.]+), at chance ([\d.]+)", text)
    assert value < chance - 0.5
    raw, untrained, trained = numbers(r"raw features ([\d.]+)%, untrained GCN ([\d.]+)%, trained GCN ([\d.]+)%", text)
    assert trained > raw + 35
    assert trained > untrained + 10
    assert "four N x N matrices would be 1.5 GiB" in text
    if ON_LINUX:
        assert 10 < numbers(r"10,000 x 128: (\d+) MiB over the rows", text)[0] < 80


def test_sentence_embeddings():
    text = printed("sentence_embeddings.py")
    untrained, without, with_keys = (
        numbers(rf"{name}: +recall@1 ([\d.]+)%", text)[0] for name in ("untrained", "without keys", "with keys")
    )
    assert untrained < 10
    assert without > 30
    assert with_keys > without + 2


def test_million_classes():
    """With a quarter of its rows: what it shows is of the classes."""
    text = printed("million_classes.py", "128")
    first, _, last, chance = numbers(r"step by step: ([\d.]+), ([\d.]+), ([\d.]+); at chance ([\d.]+)", text)
    assert last < 3 < chance < first
    assert chance == 13.82
    assert "needs 1.4 GiB for the log-softmax" in text
    if ON_LINUX:
        assert 240 < numbers(r"1,000,000 classes: (\d+) MiB over the 244 MiB of prototypes", text)[0] < 1000


def test_large_batch():
    """With half of its pictures, and so half of everything else."""
    text = printed("large_batch.py", "256")
    apart = [numbers(rf"chunks of {chunk}: .*gradients ([\d.e+-]+) apart", text)[0] for chunk in (64, 16, 4)]
    assert max(apart) < 1e-4
    if ON_LINUX:
        direct, half, least = (numbers(rf"{way}: (\d+) MiB", text)[0] for way in ("direct", "chunks of 64", "chunks of 4"))
        assert least < half < 0.6 * direct
        assert least < 0.25 * direct


def grace(u, v, temperature):
    """Zhu et al. 2020, eq. 1 and 2: a node's other view among all nodes of the other view and all others of its own; both views' mean."""
    u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
    losses = []
    for own, other in ((u, v), (v, u)):
        for i in range(len(own)):
            between, within = other @ own[i] / temperature, own @ own[i] / temperature
            within = torch.cat([within[:i], within[i + 1 :]])
            losses.append(torch.cat([between, within]).logsumexp(0) - between[i])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("nodes", [1, 2, 9])
def test_graces_loss_is_nt_xent_of_both_views(device, nodes):
    u, v = (torch.randn(nodes, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    ours, theirs = functional.nt_xent_loss(u, v, temperature=0.4), grace(u, v, 0.4)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for mine, want in zip(torch.autograd.grad(ours, (u, v)), torch.autograd.grad(theirs, (u, v)), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)
