"""Samplers, schedules and augmentation: their statistics and their exact values."""

import math

import pytest
import torch

pytest.importorskip("numpy", reason="needs the [train] extra")

import augment
from augment import Augmentation, Draws, apply_operation
from sampling import Sampler
from schedule import feature_weight, learning_rate

COUNTS = torch.tensor([400, 100, 25, 4])
LABELS = torch.arange(4).repeat_interleave(COUNTS)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [("class-balanced", [1, 1, 1, 1]), ("square-root", [20, 10, 5, 2]), ("reverse", [1 / 400, 1 / 100, 1 / 25, 1 / 4])],
)
def test_classes_come_as_the_rule_says(rule, weights):
    n = 20_000
    drawn = LABELS[Sampler(LABELS, rule, seed=0).draw(n)].bincount(minlength=4).double()
    p = torch.tensor(weights, dtype=torch.float64)
    p /= p.sum()
    deviation = (drawn - n * p).abs() / (n * p * (1 - p)).sqrt()
    assert deviation.max() < 4  # standard deviations


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


@pytest.mark.parametrize("rule", ["instance", "class-balanced"])
def test_sampler_goes_on_from_its_state(rule):
    sampler = Sampler(LABELS, rule, seed=3)
    sampler.draw(333)
    state = sampler.state_dict()
    expected = sampler.draw(1000)
    other = Sampler(LABELS, rule, seed=99)
    other.load_state_dict(state)
    assert torch.equal(other.draw(1000), expected)
    assert not torch.equal(Sampler(LABELS, rule, seed=4).draw(1000), Sampler(LABELS, rule, seed=5).draw(1000))


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
def test_feature_weight(schedule, values):
    assert [feature_weight(schedule, t, 4) for t in range(4)] == pytest.approx(values)


def test_feature_weight_beta_is_a_function_of_seed_and_epoch():
    draws = torch.tensor([feature_weight("beta", t, 2000, seed=7) for t in range(2000)])
    assert draws.tolist() == [pytest.approx(feature_weight("beta", t, 5, seed=7)) for t in range(2000)]
    assert abs(draws.mean() - 0.5) < 0.04 and abs(draws.var() - 0.25 / 1.4) < 0.01  # Beta(a, a): variance 1 / (4 (2 a + 1))


def test_learning_rate():
    cosine = [learning_rate(0.4, step, 100) for step in range(100)]
    assert cosine[0] == 0.4 and cosine[50] == pytest.approx(0.2) and cosine == sorted(cosine, reverse=True) and 0 < cosine[-1] < 2e-4
    warm = [learning_rate(0.4, step, 100, warmup=0.1) for step in range(100)]
    assert warm[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)]) and warm[10] == 0.4
    stepped = [learning_rate(0.5, step, 200, milestones=(0.6, 0.8)) for step in (0, 119, 120, 159, 160, 199)]
    assert stepped == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    ldam = [learning_rate(0.1, step, 200, warmup=0.025, milestones=(0.8, 0.9), factor=0.01) for step in (5, 159, 160, 179, 180, 199)]
    assert ldam == pytest.approx([0.1, 0.1, 1e-3, 1e-3, 1e-5, 1e-5])


def images(n=64, channels=3, side=8):
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8)


def test_evaluation_only_normalizes():
    x = images()
    expected = (x / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    chosen = Augmentation(crop_padding=4, flip=True, grayscale=1, color_jitter=1, randaugment=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    torch.testing.assert_close(chosen.evaluate(x), expected)
    none = Augmentation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    torch.testing.assert_close(none.train(x), expected)


def test_each_image_has_its_own_crop():
    x = images(1).repeat(200, 1, 1, 1)
    cropped = augment.random_crop(x, 2, Draws(200, x.device))
    padded = torch.nn.functional.pad(x[0], (2,) * 4)
    windows = {padded[:, r : r + 8, c : c + 8].numpy().tobytes() for r in range(5) for c in range(5)}
    seen = {image.numpy().tobytes() for image in cropped}
    assert seen <= windows and len(seen) > 20


def test_flip_and_grayscale_by_image():
    x = images(400)
    unit = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    flipped = (Augmentation(flip=True, **unit).train(x) == (x / 255).flip(3)).flatten(1).all(1)
    kept = (Augmentation(flip=True, **unit).train(x) == x / 255).flatten(1).all(1)
    assert 140 < flipped.sum() < 260 and 140 < kept.sum() < 260
    grey = Augmentation(grayscale=0.2, **unit).train(x)
    is_grey = (grey[:, 0] == grey[:, 1]).flatten(1).all(1)
    assert 48 < is_grey.sum() < 112
    torch.testing.assert_close(grey[is_grey][:, 0], (x[is_grey] / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1))
    assert torch.equal(grey[~is_grey], x[~is_grey] / 255)


def test_a_quarter_turn_moves_the_corner():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 0, 0] = 1
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    assert (augment.warp(x, turn, torch.zeros(1, 2)) > 0.5).nonzero().tolist() == [[0, 0, 8, 0]]
    moved = augment.warp(x, torch.eye(2)[None], torch.tensor([[-2 / 9 * 3, 0.0]]))  # three pixels to the right
    assert (moved > 0.5).nonzero().tolist() == [[0, 0, 0, 3]]


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_randaugment_operation_touches_the_images_that_drew_it(name):
    x = images(16) / 255 * 0.6 + 0.2
    operation = augment.OPERATIONS.index(name)
    choice = torch.full((16,), operation)
    choice[::2] = 0  # identity
    done = apply_operation(x, choice, torch.full((16,), 0.5))
    torch.testing.assert_close(done[::2], x[::2], atol=2e-6, rtol=0)
    changed = (done[1::2] - x[1::2]).abs().amax((1, 2, 3)) > 1e-3
    assert changed.any() == changed.all() == (name != "identity")
    assert done.isfinite().all() and done.min() >= 0 and done.max() <= 1


def test_color_jitter_of_strength_zero_changes_nothing_and_hue_keeps_grey():
    x = images(8) / 255
    torch.testing.assert_close(augment.color_jitter(x, 0.0, Draws(8, x.device)), x, atol=2e-6, rtol=0)
    grey = torch.full((2, 3, 2, 2), 0.4)
    torch.testing.assert_close(augment.mix_channels(grey, torch.tensor([0.3, 1.7]), torch.tensor([0.1, 0.4])), grey)
    assert augment.color_jitter(x, 1.0, Draws(8, x.device)).isfinite().all()


def test_grayscale_images_take_every_option():
    x = images(8, channels=1)
    chosen = Augmentation(crop_padding=1, flip=True, rotate=15, shift=0.1, zoom=0.1, grayscale=0.5, color_jitter=0.5, randaugment=2)
    assert chosen.train(x).shape == (8, 1, 8, 8)
