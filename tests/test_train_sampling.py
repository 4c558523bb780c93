"""Samplers and schedules: their statistics and their exact values."""

import math

import pytest
import torch

pytest.importorskip("numpy", reason="needs train/requirements.txt")

from sampling import Sampler, power_within
from schedule import branch_weights, learning_rate, switch_epoch

COUNTS = torch.tensor([400, 100, 25, 4])
LABELS = torch.arange(4).repeat_interleave(COUNTS)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [("class-balanced", [1, 1, 1, 1]), ("square-root", [20, 10, 5, 2]), ("reverse", [1 / 400, 1 / 100, 1 / 25, 1 / 4])],
)
def test_classes_come_as_the_rule_says(rule, weights):
    n = 20_000
    sampler = Sampler(LABELS, rule, seed=0)
    drawn = LABELS[sampler.draw(n)].bincount(minlength=4).double()
    p = torch.tensor(weights, dtype=torch.float64)
    p /= p.sum()
    torch.testing.assert_close(sampler.prior, p)
    deviation = (drawn - n * p).abs() / (n * p * (1 - p)).sqrt()
    assert deviation.max() < 4  # standard deviations


@pytest.mark.parametrize("most", [40, 100, 1000])
def test_budgeted_shows_the_rarest_images_so_often_and_no_more(most):
    """10,000 draws of 529 images are 19 passes; of balanced classes the four images of the last would come 625 times each."""
    sampler, budget = Sampler(LABELS, "budgeted", seed=0, budget=10_000, most_shown=most), 10_000
    power = power_within(budget, most, COUNTS)
    assert (power == 0) == (most == 1000)
    expected = COUNTS.double() ** power
    torch.testing.assert_close(sampler.prior, expected / expected.sum(), rtol=1e-12, atol=0)
    assert (budget * sampler.prior / COUNTS)[3].item() == pytest.approx(min(most, 625), rel=1e-9)
    drawn = LABELS[sampler.draw(budget)].bincount(minlength=4).double()
    deviation = (drawn - budget * sampler.prior).abs() / (budget * sampler.prior * (1 - sampler.prior)).sqrt()
    assert deviation.max() < 4  # standard deviations


@pytest.mark.parametrize(("most", "counts"), [(18, COUNTS), (1, COUNTS), (10, torch.tensor([7, 7])), (10, torch.tensor([5]))])
def test_budgeted_is_a_plain_pass_where_that_shows_an_image_more_often(most, counts):
    assert power_within(19 * int(counts.sum()), most, counts) == 1


def test_instance_balanced_is_a_shuffled_pass():
    sampler = Sampler(LABELS, "instance", seed=0)
    passes = [torch.cat([sampler.draw(100), sampler.draw(429)]) for _ in range(2)]
    for one in passes:
        assert one.sort().values.tolist() == list(range(529))
    assert not torch.equal(*passes)


@pytest.mark.parametrize("rule", ["class-balanced", "square-root", "reverse"])
def test_every_image_of_a_class_before_any_repeats(rule):
    sampler = Sampler(LABELS, rule, seed=1)
    drawn = torch.cat([sampler.draw(64) for _ in range(40)])
    for c in range(4):
        of_class = drawn[LABELS[drawn] == c]
        for deck in of_class.split(int(COUNTS[c])):
            assert len(deck.unique()) == len(deck)


@pytest.mark.parametrize("rule", ["instance", "class-balanced", "budgeted"])
def test_sampler_goes_on_from_its_state(rule):
    options = {"budget": 5000, "most_shown": 20}
    sampler = Sampler(LABELS, rule, seed=3, **options)
    sampler.draw(333)
    state = sampler.state_dict()
    expected = sampler.draw(1000)
    other = Sampler(LABELS, rule, seed=99, **options)
    other.load_state_dict(state)
    assert torch.equal(other.draw(1000), expected)
    assert not torch.equal(Sampler(LABELS, rule, seed=4).draw(1000), Sampler(LABELS, rule, seed=5).draw(1000))


def test_a_longer_budget_goes_on_as_a_plain_pass():
    """A run that is extended: by classes before, one deck of all images from here on."""
    short = Sampler(LABELS, "budgeted", seed=3, budget=5000, most_shown=20)
    long = Sampler(LABELS, "budgeted", seed=3, budget=50_000, most_shown=20)
    short.draw(100)
    long.draw(100)  # as a run does before it is loaded
    long.load_state_dict(short.state_dict())
    assert long.draw(529).sort().values.tolist() == list(range(529))


def test_labels_in_any_order():
    labels = LABELS[torch.randperm(len(LABELS))]
    drawn = Sampler(labels, "class-balanced", seed=0).draw(4000)
    assert (labels[drawn].bincount() - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("parabolic-decay", [1, 0.9375, 0.75, 0.4375]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, math.cos(math.pi / 8), math.sqrt(0.5), math.cos(3 * math.pi / 8)]),
        ("constant", [0.5] * 4),
        ("parabolic-increment", [0, 0.0625, 0.25, 0.5625]),
        ("switch", [1, 1, 0, 0]),
        ("two-stage", [1, 1, 0, 0]),
    ],
)
def test_branch_weights(schedule, values):
    weights = [branch_weights(schedule, t, 4) for t in range(4)]
    assert [alpha for alpha, _ in weights] == pytest.approx(values)
    assert [beta for _, beta in weights] == pytest.approx([1 - alpha for alpha in values])


def test_sum_weighs_both_by_one():
    assert [branch_weights("sum", t, 4) for t in range(4)] == [(1.0, 1.0)] * 4


def test_branch_weights_beta_are_a_function_of_seed_and_epoch():
    draws = torch.tensor([branch_weights("beta", t, 2000, seed=7) for t in range(2000)], dtype=torch.float64)
    assert draws.tolist() == [pytest.approx(branch_weights("beta", t, 5, seed=7)) for t in range(2000)]
    torch.testing.assert_close(draws.sum(1), torch.ones(2000, dtype=torch.float64))
    alpha = draws[:, 0]
    assert abs(alpha.mean() - 0.5) < 0.04 and abs(alpha.var() - 0.25 / 1.4) < 0.01  # Beta(a, a): variance 1 / (4 (2 a + 1))
    assert branch_weights("beta", 0, 5, seed=8) != branch_weights("beta", 0, 5, seed=7)


@pytest.mark.parametrize("schedule", ["switch", "two-stage"])
def test_the_switch_is_the_first_epoch_of_the_classifier(schedule):
    """0.07 * 100 is above 7 in floating point, and 7 / 100 is 0.07: one comparison decides."""
    for hundredths in range(100):
        for epochs in (1, 7, 50, 100):
            first = switch_epoch(hundredths / 100, epochs)
            alphas = [branch_weights(schedule, t, epochs, switch_at=hundredths / 100)[0] for t in range(epochs)]
            assert alphas == [1.0] * first + [0.0] * (epochs - first)
            assert first == -(-hundredths * epochs // 100)


def test_learning_rate():
    cosine = [learning_rate(0.4, step, 100) for step in range(100)]
    assert cosine[0] == 0.4 and cosine[50] == pytest.approx(0.2) and cosine == sorted(cosine, reverse=True) and 0 < cosine[-1] < 2e-4
    warm = [learning_rate(0.4, step, 100, warmup=0.1) for step in range(100)]
    assert warm[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)]) and warm[10] == 0.4
    stepped = [learning_rate(0.5, step, 200, milestones=(0.6, 0.8)) for step in (0, 119, 120, 159, 160, 199)]
    assert stepped == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    ldam = [learning_rate(0.1, step, 200, warmup=0.025, milestones=(0.8, 0.9), factor=0.01) for step in (5, 159, 160, 179, 180, 199)]
    assert ldam == pytest.approx([0.1, 0.1, 1e-3, 1e-3, 1e-5, 1e-5])
