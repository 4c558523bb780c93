"""The table of methods: recipes that can be run, KCL's positives, GPaCo's queue, figures with their sources."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "train"))
methods = pytest.importorskip("methods")
import reported  # noqa: E402
import settings  # noqa: E402

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def setup(method: str, batch: int = 12, **changes):
    chosen = settings.configure("digits", method, device="cpu", **changes).method
    options = {"backend": "auto", "group": None}
    counts = torch.tensor([40.0, 20.0, 5.0])
    return methods.Setup(chosen, counts, counts / counts.sum(), 6, 4, batch, options)


@pytest.mark.parametrize("method", [name for name, entry in methods.METHODS.items() if entry.paper])
@pytest.mark.parametrize("data", ["digits", "cifar10-lt", "cifar100-lt"])
def test_the_settings_of_every_paper_are_a_recipe(data, method):
    config = settings.configure(data, method, paper=True, device="cpu")
    assert config.method.method == method


def test_paper_is_refused_where_it_would_change_nothing():
    with pytest.raises(ValueError, match="paper must be False for method 'ours'"):
        settings.configure("cifar10-lt", "ours", paper=True, device="cpu")


def test_ldams_schedule():
    optimiser = settings.configure("cifar10-lt", "ldam-drw", paper=True, device="cpu").optimiser
    assert (optimiser.epochs, optimiser.batch, optimiser.lr, optimiser.weight_decay) == (200, 128, 0.1, 2e-4)
    assert (optimiser.warmup * 200, [m * 200 for m in optimiser.milestones], optimiser.lr_factor) == (5, [160, 180], 0.01)


def test_weighted_mean_needs_weights():
    with pytest.raises(ValueError, match="weighted_mean acts on class_weights alone"):
        settings.configure("digits", "ce", weighted_mean="images", device="cpu")


def test_kcl_draws_the_other_view_and_k_of_the_other_images():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 8 + [1] * 3 + [2])  # of 12 images
    loss = methods.FEATURE_LOSSES["kcl"].build(setup("kcl"))
    rows = torch.arange(24)
    times = torch.zeros(24, 24)
    for _ in range(2000):
        drawn = loss.draw(labels.repeat(2))
        assert torch.equal(drawn[:, 0], (rows + 12) % 24)
        times.view(-1).index_add_(0, (rows[:, None] * 24 + drawn).view(-1)[drawn.view(-1) >= 0], torch.ones(int((drawn >= 0).sum())))
    same = labels.repeat(2)[:, None] == labels.repeat(2)
    other = same & (rows[:, None] % 12 != rows % 12)
    assert (times[~same] == 0).all() and (times.diagonal() == 0).all()
    expected = torch.where(other, 2000 * 6 / other.sum(1, keepdim=True).clamp_min(6), 0.0)  # 6 of 14, all 4, none
    torch.testing.assert_close(times[other], expected[other], rtol=0.12, atol=0)


def test_kcl_is_the_mean_over_what_is_drawn():
    torch.manual_seed(0)
    z, labels = torch.randn(24, 4, dtype=torch.float64), (torch.arange(12) % 3).repeat(2)
    loss = methods.FEATURE_LOSSES["kcl"].build(setup("kcl", positives=2))
    torch.manual_seed(1)
    drawn = loss.draw(labels)
    torch.manual_seed(1)
    value = loss(methods.Branch(z, labels, z, None, None))
    unit = torch.nn.functional.normalize(z)
    logits = (unit @ unit.T / 0.07).fill_diagonal_(-torch.inf)
    each = [logits[i].logsumexp(0) - logits[i, [j for j in drawn[i].tolist() if j >= 0]].mean() for i in range(24)]
    torch.testing.assert_close(value, torch.stack(each).mean())


def test_gpaco_keeps_its_second_views():
    torch.manual_seed(0)
    made = setup("gpaco", queue=40)
    loss = methods.FEATURE_LOSSES["gpaco"].build(made)
    assert (loss.options["alpha"], loss.options["temperature"]) == (0.01, 0.07)
    z, features, labels = torch.randn(24, 4), torch.randn(24, 6), (torch.arange(12) % 3).repeat(2)
    classifier = torch.nn.Linear(6, 3)
    first = loss(methods.Branch(z, labels, features, None, classifier))
    assert int(loss.queue.filled) == 12
    torch.testing.assert_close(loss.queue.rows[:12], z[12:])

    unit = torch.nn.functional.normalize(z)
    logits = (unit @ unit.T / 0.07).fill_diagonal_(-torch.inf)
    own = classifier(features) + (made.counts / made.counts.sum()).log()
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    pulled = own.gather(1, labels[:, None])[:, 0] + 0.01 * logits.where(positive, 0).sum(1)
    expected = torch.cat([own, logits], 1).logsumexp(1) - pulled / (1 + 0.01 * positive.sum(1))
    torch.testing.assert_close(first, expected.mean())


def test_every_figure_is_of_a_method_and_in_range():
    assert {figure.method for figure in reported.FIGURES} <= set(methods.METHODS)
    assert len(set(reported.FIGURES)) == len(reported.FIGURES)
    assert all(30 < figure.accuracy < 95 and figure.of and figure.seen for figure in reported.FIGURES)
    figures = reported.reported("hybrid-sc", "cifar10-lt", 100.0)
    assert [figure.accuracy for figure in figures] == [81.4]
    assert not reported.reported("hybrid-sc", "cifar10-jpeg", 100.0)
    assert {figure.accuracy for figure in reported.reported("ce", "cifar10-lt", 100.0)} == {70.36, 71.36}
    assert [figure.accuracy for figure in reported.reported("crt", "imagenet-lt", None)] == [49.6]


def test_the_page_has_every_method():
    rows = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    assert rows == list(methods.METHODS)
