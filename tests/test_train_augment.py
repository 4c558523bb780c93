"""Augmentation: exact values, Pillow's where it has the operation; frequencies, ranges, and the parts of a shared batch."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("numpy", reason="needs train/requirements.txt")

import augment
import numpy as np
from augment import AUGMENTATIONS, OPERATIONS, POLICIES, Augmentation, Drawn, Draws, apply_operation
from PIL import Image, ImageEnhance, ImageOps

UNIT = {"mean": (0.0,), "std": (1.0,)}
EVERYTHING = Augmentation(
    crop_padding=1, crop_scale=(0.3, 1), flip=True, rotate=15, shift=0.1, zoom=0.1, autoaugment="cifar10", randaugment=2,
    color_jitter=0.5, color_jitter_probability=0.8, grayscale=0.5, blur=0.5, cutout=3,
)  # fmt: skip


def images(n=64, channels=3, side=8):
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8)


def draws_of(n):
    return Draws(n, torch.device("cpu"))


def same(a, b):
    """[N]: whether all of an image is equal."""
    return (a == b).flatten(1).all(1)


def within(count, n, p, deviations=5):
    return abs(count - n * p) <= deviations * math.sqrt(n * p * (1 - p))


# ---- the whole


def test_evaluation_only_normalizes():
    x = images()
    statistics = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    expected = (x / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(dataclasses.replace(EVERYTHING, **statistics).evaluate(x), expected)
    torch.testing.assert_close(Augmentation(**statistics).train(x), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*AUGMENTATIONS, "everything"])
def test_a_recipe_keeps_shape_and_range_and_follows_the_seed(name, channels):
    chosen = dataclasses.replace(AUGMENTATIONS.get(name, EVERYTHING), **UNIT)
    x = images(40, channels, 12)
    torch.manual_seed(5)
    done = chosen.train(x)
    assert done.shape == x.shape and done.dtype == torch.float32 and done.min() >= -1e-5 and done.max() <= 1 + 1e-5
    assert torch.equal(done, x / 255) == (name == "none")
    other = chosen.train(x)
    assert torch.equal(done, other) == (name == "none")
    torch.manual_seed(5)
    assert torch.equal(done, chosen.train(x))


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "everything"])
def test_parts_of_a_batch_are_the_whole(name):
    chosen = AUGMENTATIONS.get(name, EVERYTHING)
    x = images(31, side=16)
    torch.manual_seed(6)
    whole = chosen.train(x)
    for own in torch.randperm(31).split((11, 1, 19)):
        torch.manual_seed(6)
        torch.testing.assert_close(chosen.train(x[own], Draws(31, x.device, own)), whole[own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "everything"])
def test_nothing_depends_on_values_that_lie_on_a_device(name):
    """A meta tensor has no values: whatever would wait for them, or take its shape from them, fails."""
    chosen = AUGMENTATIONS.get(name, EVERYTHING)
    x = torch.empty(9, 3, 16, 16, dtype=torch.uint8, device="meta")
    assert chosen.train(x).shape == (9, 3, 16, 16)
    assert augment.mixup(chosen.train(x), 0.2, Draws(9, x.device))[0].shape == (9, 3, 16, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*AUGMENTATIONS, "everything"])
def test_a_cuda_graph_replays_it(name):
    chosen = AUGMENTATIONS.get(name, EVERYTHING)
    x = images(64, side=32).cuda()
    chosen.train(x)  # brings the constants to the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        done = chosen.train(x)
    graph.replay()
    first = done.clone()
    graph.replay()
    assert first.isfinite().all() and torch.equal(first, done) == (name == "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "crop_padding must not be negative, got -1"),
        ({"rotate": -1.0}, "rotate must not be negative"),
        ({"shift": -0.1}, "shift must not be negative"),
        ({"randaugment": -1}, "randaugment must not be negative"),
        ({"color_jitter": -1.0}, "color_jitter must not be negative"),
        ({"cutout": -2}, "cutout must not be negative"),
        ({"zoom": 1.0}, r"zoom must be in \[0, 1\), got 1.0"),
        ({"grayscale": 1.2}, r"grayscale must be a probability, in \[0, 1\], got 1.2"),
        ({"blur": -0.1}, "blur must be a probability"),
        ({"color_jitter_probability": math.nan}, "color_jitter_probability must be a probability"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be \(smallest, largest\) in \(0, 1\], got \(0.0, 1.0\)"),
        ({"crop_scale": (0.9, 0.2)}, "crop_scale must be"),
        ({"autoaugment": "svhn"}, "autoaugment must be one of none, cifar10, imagenet, got 'svhn'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_equal_constants_of_two_types_are_two():
    cpu = torch.device("cpu")
    whole, real = augment.constant((1, 0), cpu, torch.int64), augment.constant((1.0, 0.0), cpu)
    assert whole.dtype == torch.int64 and real.dtype == torch.float32 and whole is augment.constant((1, 0), cpu, torch.int64)


# ---- where a pixel comes from


def test_each_image_has_its_own_crop():
    x = images(1).repeat(200, 1, 1, 1)
    cropped = augment.crop_and_flip(x, 2, False, draws_of(200))
    padded = torch.nn.functional.pad(x[0], (2,) * 4)
    windows = {padded[:, r : r + 8, c : c + 8].numpy().tobytes() for r in range(5) for c in range(5)}
    seen = {image.numpy().tobytes() for image in cropped}
    assert seen <= windows and len(seen) > 20
    flipped = augment.crop_and_flip(x, 2, True, draws_of(200))
    mirrored = {padded[:, r : r + 8, c : c + 8].flip(2).numpy().tobytes() for r in range(5) for c in range(5)}
    of_mirrored = sum(image.numpy().tobytes() in mirrored for image in flipped)
    assert {image.numpy().tobytes() for image in flipped} <= windows | mirrored and within(of_mirrored, 200, 0.5)


def test_crops_of_images_that_are_not_square():
    x = torch.randint(0, 256, (50, 3, 6, 10), dtype=torch.uint8)
    assert same(augment.crop_and_flip(x, 0, True, draws_of(50)), x).logical_or(same(x.flip(3), x)).sum() < 50
    for options in ({"crop_padding": 2}, {"crop_scale": (0.2, 1)}, {"cutout": 4}, {"blur": 1.0}, {"autoaugment": "imagenet"}):
        assert Augmentation(**options).train(x).shape == x.shape


def test_flip_and_grayscale_by_image():
    x = images(400)
    flipped = Augmentation(flip=True, **UNIT).train(x)
    assert within(same(flipped, (x / 255).flip(3)).sum(), 400, 0.5) and (same(flipped, (x / 255).flip(3)) | same(flipped, x / 255)).all()
    grey = Augmentation(grayscale=0.2, **UNIT).train(x)
    is_grey = same(grey[:, 0], grey[:, 1])
    assert within(is_grey.sum(), 400, 0.2)
    torch.testing.assert_close(grey[is_grey][:, 0], (x[is_grey] / 255 * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1))
    assert torch.equal(grey[~is_grey], x[~is_grey] / 255)


def test_a_quarter_turn_moves_the_corner():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 0, 0] = 1
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    assert (augment.warp(x, turn, torch.zeros(1, 2)) > 0.5).nonzero().tolist() == [[0, 0, 8, 0]]
    moved = augment.warp(x, torch.eye(2)[None], torch.tensor([[-2 / 9 * 3, 0.0]]))  # three pixels to the right
    assert (moved > 0.5).nonzero().tolist() == [[0, 0, 0, 3]]


def crops(scale, n=4000, side=32):
    """The crops of ``side`` x ``side`` images, read off images that hold their own coordinates: first row, rows, first column, columns."""
    at = torch.arange(side).float()
    x = torch.stack([at[:, None].expand(side, side), at.expand(side, side)])[None].expand(n, 2, side, side)
    rows, columns = augment.random_resized_crop(x, scale, draws_of(n)).unbind(1)
    return [(low.round(), (high - low).round() + 1) for low, high in ((v.amin((1, 2)), v.amax((1, 2))) for v in (rows, columns))]


def test_a_resized_crop_has_torchvisions_sizes():
    n = 4000
    (top, height), (left, width) = crops((0.2, 1.0), n)
    assert (top >= 0).all() and (top + height <= 32).all() and (left >= 0).all() and (left + width <= 32).all()
    area, ratio = height * width / 1024, width / height
    assert area.min() > 0.17 and area.max() <= 1 and ratio.min() > 0.7 and ratio.max() < 1.43  # but for the rounding to pixels
    random = np.random.default_rng(0)
    expected = []
    for _ in range(n):
        for _ in range(10):
            a, r = random.uniform(0.2, 1) * 1024, math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(a * r)), round(math.sqrt(a / r))
            if w <= 32 and h <= 32:
                expected.append((h, w, random.integers(0, 32 - h + 1)))
                break
    expected = torch.tensor(expected).float()
    for ours, theirs in zip((height, width, top), expected.unbind(1), strict=True):
        spread = theirs.std() * math.sqrt(2 / n)
        assert abs(ours.mean() - theirs.mean()) < 5 * spread
        assert abs(ours.std() / theirs.std() - 1) < 0.08


def test_a_resized_crop_is_pillows_bilinear():
    x = images(20, side=16)
    torch.manual_seed(8)
    done = augment.random_resized_crop(x / 255, (0.2, 1.0), draws_of(20))
    torch.manual_seed(8)
    at = torch.arange(16).float()
    coordinates = torch.stack([at[:, None].expand(16, 16), at.expand(16, 16)])[None].expand(20, 2, 16, 16)
    where = augment.random_resized_crop(coordinates, (0.2, 1.0), draws_of(20)).round().int()
    for image, result, (rows, columns) in zip(x, done, where, strict=True):
        box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(box).resize((16, 16), Image.Resampling.BILINEAR)
        torch.testing.assert_close(result * 255, torch.from_numpy(np.array(small)).permute(2, 0, 1).float(), rtol=0, atol=1.01)


def test_where_no_attempt_fits_all_is_taken():
    x = torch.rand(5, 3, 4, 40)
    torch.testing.assert_close(augment.random_resized_crop(x, (1.0, 1.0), draws_of(5)), x)


# ---- colour, blur, cutout


def test_color_jitter_of_strength_zero_changes_nothing_and_hue_keeps_grey():
    x = images(8) / 255
    torch.testing.assert_close(augment.color_jitter(x, 0.0, draws_of(8)), x, atol=2e-6, rtol=0)
    grey = torch.full((2, 3, 2, 2), 0.4)
    torch.testing.assert_close(augment.mix_channels(grey, torch.tensor([0.3, 1.7]), torch.tensor([0.1, 0.4])), grey)
    assert augment.color_jitter(x, 1.0, draws_of(8)).isfinite().all()


def test_color_jitter_comes_with_its_probability():
    x = images(1000) / 255
    jittered = (augment.color_jitter(x, 0.5, draws_of(1000), 0.8) - x).abs().amax((1, 2, 3)) > 1e-3
    assert within(jittered.sum(), 1000, 0.8)


def test_blur_is_a_gaussian_that_keeps_the_sum_of_its_weights():
    x = torch.zeros(3, 1, 31, 31)
    x[:, :, 15, 15] = 1
    sigma = torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1, 1)
    blurred = augment.blur(x, sigma, torch.tensor([True, True, True]).view(-1, 1, 1, 1))
    at = torch.arange(31.0) - 15
    for image, s in zip(blurred[:, 0], (0.5, 1.0, 2.0), strict=True):
        gauss = (-(at**2) / (2 * s * s)).exp()
        torch.testing.assert_close(image, torch.outer(gauss, gauss) / gauss.sum() ** 2)
    even = torch.full((2, 3, 9, 9), 0.7)
    torch.testing.assert_close(augment.blur(even, sigma[:2], torch.tensor([True, False]).view(-1, 1, 1, 1)), even)
    x = images(500) / 255
    blurred = Augmentation(blur=0.5, **UNIT).train(images(500))
    chosen = torch.arange(500).view(-1, 1, 1, 1) % 2 == 0
    assert torch.equal(same(augment.blur(x, torch.ones(500, 1, 1, 1), chosen), x), ~chosen.flatten()) and blurred.max() <= 1 + 1e-6


def test_cutout_is_a_black_square_cut_at_the_border():
    x = torch.full((4000, 3, 32, 32), 0.5)
    done = augment.cutout(x, 16, draws_of(4000))
    black = done[:, 0] == 0
    assert torch.equal(black[:, None].expand_as(x), done == 0) and (done[~black[:, None].expand_as(x)] == 0.5).all()
    rows, columns = black.any(2), black.any(1)
    assert torch.equal(black, rows[:, :, None] & columns[:, None])
    for line in (rows, columns):
        length = line.sum(1)
        expected = torch.tensor([min(m + 8, 32) - max(m - 8, 0) for m in range(32)]).bincount(minlength=17) / 32
        assert length.min() == 8 and length.max() == 16  # the middle lies inside the image
        assert all(within(got, 4000, p) for got, p in zip(length.bincount(minlength=17).tolist(), expected.tolist(), strict=True))
    normalized = Augmentation(cutout=8, mean=(0.5,), std=(0.25,)).train(torch.full((3, 3, 8, 8), 255, dtype=torch.uint8))
    assert set(normalized.unique().tolist()) == {-2.0, 2.0}  # black, then normalised


# ---- AutoAugment and RandAugment


def pillow(image, name, magnitude):
    """What Pillow makes of it, called as PaCo's code calls it."""
    strength = magnitude / 9
    enhance = {n: getattr(ImageEnhance, n.capitalize()) for n in ("brightness", "color", "contrast", "sharpness")}
    if name in enhance:
        return enhance[name](image).enhance(1 + 0.9 * strength)
    fill = 128 if image.mode == "L" else (128,) * 3
    if name == "rotate":
        return image.rotate(-30 * strength, fillcolor=fill)
    reach = 150 / 331 * strength
    affine = {
        "shear_x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": (1, 0, reach * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, reach * image.height),
    }
    if name in affine:
        filter = Image.Resampling.BICUBIC if name.startswith("shear") else Image.Resampling.NEAREST
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], filter, fillcolor=fill)
    others = {
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - abs(strength))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }
    return others[name]()


def hard_images(channels, side=32):
    """Noise over all levels and over some; smooth; of one level; of two; with a level missing in one channel."""
    noise, some = images(3, channels, side), torch.randint(60, 180, (3, channels, side, side), dtype=torch.uint8)
    at = torch.linspace(0, 1, side)
    smooth = (255 * torch.rand(3, channels, 1, 1) * (at[:, None] * torch.rand(3, 1, 1, 1) + at) / 2).to(torch.uint8)
    even = images(3, channels, 1).expand(3, channels, side, side)
    two = torch.where(torch.rand(3, 1, side, side) < 0.02, 200, even).to(torch.uint8)
    mixed = torch.cat([noise[:, : channels - 1], even[:, :1]], 1)
    return torch.cat([noise, some, smooth, even, two, mixed])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_pillows_levels(name, channels):
    torch.manual_seed(0)
    x = hard_images(channels)
    for magnitude in (0, 1, -2, 3, -4, 5, -6, 7, -8, 9, -9):
        done = apply_operation(x, torch.full((len(x),), OPERATIONS.index(name)), torch.full((len(x),), float(magnitude)))
        modes = [image.permute(1, 2, 0).squeeze(2).numpy() if channels == 1 else image.permute(1, 2, 0).numpy() for image in x]
        expected = np.stack([np.array(pillow(Image.fromarray(image), name, magnitude)) for image in modes])
        apart = (done.int() - torch.from_numpy(expected).view(len(x), 32, 32, channels).permute(0, 3, 1, 2).int()).abs()
        several, any = ((apart > least).float().mean() for least in (1, 0))
        if name.startswith("shear") or name == "rotate":  # rounding decides where a pixel is read on the very border between two
            assert several <= 1 / 32**2 and any < 2.5e-3
        elif name == "autocontrast":  # Pillow's floats may fall below a whole level; our integers do not
            assert several == 0 and any < 5e-3
        else:
            assert any == 0, magnitude


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_touches_only_the_images_that_drew_it(name):
    x = torch.randint(60, 180, (16, 3, 16, 16), dtype=torch.uint8)
    choice = torch.full((16,), OPERATIONS.index(name))
    choice[::2] = 0  # identity
    done = apply_operation(x, choice, torch.full((16,), 4.0))
    assert torch.equal(done[::2], x[::2])
    changed = ~same(done[1::2], x[1::2])
    assert changed.any() == (name != "identity")
    assert done.dtype == torch.uint8


def test_every_operation_on_every_image_is_the_same_as_on_those_that_drew_it():
    """The one is what a GPU does, the other what a CPU does."""
    x = hard_images(3).repeat(10, 1, 1, 1)
    drawn = Drawn(torch.randint(len(OPERATIONS), (len(x),)), 18 * torch.rand(len(x)) - 9)
    levels = x
    for apply in augment.KINDS.values():
        levels = apply(levels, drawn)
    assert torch.equal(levels, apply_operation(x, *drawn))


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_has_pairs_of_known_operations(name):
    policy = POLICIES[name]
    assert len(policy) == 25 and all(len(pair) == 2 for pair in policy)
    for operation, probability, magnitude in (operation for pair in policy for operation in pair):
        assert operation in OPERATIONS and 0 <= probability <= 1 and magnitude in range(10)


def test_the_policy_draws_its_operations_as_often_as_it_says(monkeypatch):
    n, policy, seen = 20_000, POLICIES["cifar10"], []
    monkeypatch.setattr(augment, "apply_operation", lambda levels, *drawn: seen.append(drawn) or levels)
    augment.autoaugment(torch.empty(n, 3, 1, 1, dtype=torch.uint8), policy, draws_of(n))
    together = torch.zeros(len(OPERATIONS), len(OPERATIONS), dtype=torch.float64)
    expected = torch.zeros_like(together)
    for first, second in policy:
        for a, p in ((OPERATIONS.index(first[0]), first[1]), (0, 1 - first[1])):
            for b, q in ((OPERATIONS.index(second[0]), second[1]), (0, 1 - second[1])):
                expected[a, b] += p * q / len(policy)
    (first, first_magnitude, _), (second, second_magnitude, _) = seen
    together.index_put_((first, second), torch.ones((), dtype=torch.float64), accumulate=True)
    assert (together[expected == 0] == 0).all()
    deviation = (together - n * expected).abs() / (n * expected * (1 - expected)).clamp_min(1e-9).sqrt()
    assert deviation[expected > 0].max() < 4.5
    for choice, magnitude, slot in ((first, first_magnitude, 0), (second, second_magnitude, 1)):
        moves = choice == OPERATIONS.index("translate_y")
        magnitudes = {pair[slot][2] for pair in policy if pair[slot][0] == "translate_y"}
        assert set(magnitude[moves].abs().int().tolist()) == magnitudes
        assert within((magnitude[moves] > 0).sum(), moves.sum(), 0.5)


def test_a_policy_applies_the_two_operations_in_turn():
    x = images(300, side=16)
    policy = ((("invert", 1.0, 0), ("solarize", 1.0, 5)),)
    inverted = 255 - x
    expected = torch.where(inverted.float() >= 256 * (1 - 5 / 9), 255 - inverted, inverted)
    assert torch.equal(augment.autoaugment(x, policy, draws_of(300)), expected)


def test_randaugment_draws_evenly(monkeypatch):
    n, seen = 13_000, []
    monkeypatch.setattr(augment, "apply_operation", lambda levels, *drawn: seen.append(drawn) or levels)
    augment.randaugment(torch.empty(n, 3, 1, 1, dtype=torch.uint8), 2, draws_of(n))
    assert len(seen) == 2
    for choice, magnitude, _ in seen:
        assert all(within(count, n, 1 / 14) for count in choice.bincount(minlength=14).tolist()) and choice.max() == 13
        assert within((magnitude > 0).sum(), n, 0.5) and magnitude.abs().unique().tolist() == pytest.approx([2.7])


# ---- mixup


def test_mixup_is_what_it_returns():
    x = images(50) / 255
    mixed, partner, share = augment.mixup(x, 0.4, draws_of(50))
    assert partner.sort().values.tolist() == list(range(50)) and partner.tolist() != list(range(50)) and share.shape == ()
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partner])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_share_is_of_a_beta_distribution(alpha):
    shares = torch.stack([augment.mixup(torch.zeros(2, 1, 1, 1), alpha, draws_of(2))[2] for _ in range(2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * math.sqrt(variance / 2000) and abs(shares.var() / variance - 1) < 0.2


def test_processes_mix_with_one_share_each_its_own_images():
    x, parts = images(21) / 255, (torch.arange(8), torch.arange(8, 13), torch.arange(13, 21))
    torch.manual_seed(9)
    share, after = augment.mixup(x, 0.4, draws_of(21))[2], torch.rand(1)
    for own in parts:
        torch.manual_seed(9)
        mixed, partner, own_share = augment.mixup(x[own], 0.4, Draws(21, x.device, own))
        assert own_share == share and torch.rand(1) == after and partner.sort().values.tolist() == list(range(len(own)))
        torch.testing.assert_close(mixed, share * x[own] + (1 - share) * x[own][partner])


def test_mixup_names_what_is_wrong():
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        augment.mixup(torch.zeros(3, 1, 2, 2), 0.0, draws_of(3))
    with pytest.raises(ValueError, match="draws must be for as many images as images has, 3, got"):
        augment.mixup(torch.zeros(3, 1, 2, 2), 1.0, draws_of(4))
