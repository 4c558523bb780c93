"""The long tail and the readers: exact counts, exact files, and an error that names what is wrong before training starts."""

import gzip
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pooch", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")

import data as datasets
from data import Source, Split, load, long_tail, long_tail_counts, read_list, shots
from files import random_resized_crop
from PIL import Image

# The counts of the field's CIFAR sets, from paper tables, not from the formula.
CIFAR10 = {
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
}
CIFAR100 = {100: (10_847, 5, (35, 35, 30)), 50: (12_608, 10, (41, 41, 18)), 10: (19_573, 50, (69, 31, 0))}


@pytest.mark.parametrize("imbalance", CIFAR10)
def test_long_tail_counts(imbalance):
    assert long_tail_counts([5000] * 10, imbalance) == CIFAR10[imbalance]
    total, least, of_shot = CIFAR100[imbalance]
    counts = torch.tensor(long_tail_counts([500] * 100, imbalance))
    assert (counts.sum(), counts.min()) == (total, least)
    assert tuple(int(members.sum()) for members in shots(counts, 100, 20).values()) == of_shot


def test_shots_include_both_ends_in_medium():
    members = shots(torch.tensor([101, 100, 20, 19]), many=100, few=20)
    assert {name: m.tolist() for name, m in members.items()} == {
        "many": [True, False, False, False],
        "medium": [False, True, True, False],
        "few": [False, False, False, True],
    }


def test_long_tail_takes_what_uneven_classes_allow():
    assert long_tail_counts([90, 100, 5], 10) == [50, 15, 5]
    with pytest.raises(ValueError, match=r"largest_class.*60 images of class 0, expected 1 to 50"):
        long_tail_counts([50, 100], 10, 60)
    with pytest.raises(ValueError, match=r"imbalance must be at least 1, got 0\.5"):
        long_tail_counts([50, 100], 0.5)


def test_long_tail_follows_the_convention_of_one_shuffle_per_class():
    labels = np.repeat([0, 1], 6)
    random = np.random.RandomState(0)
    first, second = np.arange(6), np.arange(6, 12)
    random.shuffle(first)
    random.shuffle(second)
    assert long_tail(labels, [4, 2], 0).tolist() == [*first[:4], *second[:2]]


def ldam_split(labels, factor):
    """What LDAM's code keeps of CIFAR, in its order: NumPy's global generator seeded once, then each class shuffled in turn."""
    classes = labels.max() + 1
    np.random.seed(0)
    kept = []
    for c in range(classes):
        members = np.where(labels == c)[0]
        np.random.shuffle(members)
        kept.append(members[: int(int(len(labels) / classes) * factor ** (c / (classes - 1.0)))])
    return np.concatenate(kept)


@pytest.mark.parametrize("imbalance", [100, 50, 10, 200, 256])
@pytest.mark.parametrize("classes", [10, 100])
def test_long_tail_is_the_fields_bit_for_bit(classes, imbalance):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(classes), 50_000 // classes))
    counts = long_tail_counts([50_000 // classes] * classes, imbalance)
    assert np.array_equal(long_tail(labels, counts, 0), ldam_split(labels, 1 / imbalance))


@pytest.mark.parametrize("imbalance", [100, 50, 10])
def test_known_splits(imbalance):
    """Of labels sorted by class, as the JPEG copies have them; and the hash of a data set that shuffles would be another."""
    labels = torch.arange(10).repeat_interleave(5000)
    split = Split(torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8), labels)
    kept = long_tail(labels.numpy(), CIFAR10[imbalance], 0)
    data = datasets.Data(split[kept], None, split, [str(c) for c in range(10)], kept=kept)
    assert data.split_hash == datasets.SPLITS["cifar10-jpeg"][imbalance] != datasets.SPLITS["cifar10-lt"][imbalance]


def test_the_fields_split_is_said(tmp_path, monkeypatch):
    npz(tmp_path)
    images = Source(data="cifar10-jpeg", root=tmp_path, imbalance=4)
    found = load(images)
    assert found.kept.tolist() == [*np.random.RandomState(0).permutation(8)[:8], *found.kept[8:]] and found.notes == []
    monkeypatch.setitem(datasets.DATASETS["cifar10-jpeg"].splits, 4, found.split_hash)
    assert load(images).notes == [f"the long tail is the field's (LDAM's), split {found.split_hash}"]
    other = load(replace(images, data_seed=1))
    assert other.split_hash != found.split_hash and other.notes == []
    held = load(replace(images, validation=0.5))  # cut from the tail, which is the same
    assert held.split_hash == found.split_hash and held.fingerprint != found.fingerprint


def test_every_data_set_is_one_entry():
    for name, known in datasets.DATASETS.items():
        images = datasets.defaults(name)
        assert (images.imbalance, images.many, images.few) == (known.imbalance, known.many, known.few)
        assert len(known.mean) == len(known.std) == (3 if known.shape is None else known.shape[0] if known.shape else 1)
    assert datasets.defaults("digits", validation=0.1) == Source(imbalance=20, many=40, few=15, validation=0.1)
    with pytest.raises(ValueError, match=r"data must be one of digits, .*, got 'cifar'"):
        load(Source(data="cifar"))


def test_a_data_set_of_ones_own_is_one_entry(monkeypatch):
    def read(images):
        split = Split(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.arange(8) % 2)
        return datasets.Data(split, None, split, ["a", "b"])

    own = datasets.DataSet("mine", read, mean=(0.5,) * 3, std=(0.5,) * 3, shape=(3, 4, 4), imbalance=4.0, root="unused")
    monkeypatch.setitem(datasets.DATASETS, "mine", own)
    assert load(datasets.defaults("mine")).counts.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_list": "a.txt"}, "train_list has a meaning for data 'list' only, got a.txt for data 'digits'"),
        ({"root": "."}, "root has no meaning for data 'digits'"),
        ({"largest_class": 9}, "largest_class has a meaning with imbalance only, got 9"),
        ({"image_size": 32}, "image_size has no meaning for data 'digits', whose images have side 8, got 32"),
        ({"few": 101}, "few must be at most many, got few 101 and many 100"),
        ({"data": "list", "root": ".", "val_list": "a", "validation": 0.1}, "validation must be 0 beside val_list"),
        ({"data": "folder"}, "root must be given for data 'folder', got None"),
    ],
)
def test_an_option_that_cannot_act_is_refused(options, message):
    paths = {name: Path(value) if name in ("root", "train_list", "val_list") else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        load(Source(**paths))


def test_digits():
    data = load(Source(imbalance=20))
    assert data.counts.tolist() == [100, 71, 51, 36, 26, 18, 13, 9, 6, 5]
    assert len(data.train) == 335 and len(data.test) == 797 and data.train.images.dtype == torch.uint8

    def keys(split):
        return {(int(label), image.numpy().tobytes()) for image, label in zip(split.images, split.labels, strict=True)}

    assert not keys(data.train) & keys(data.test)
    other = load(Source(imbalance=20, data_seed=1))
    assert keys(other.train) != keys(data.train) and other.counts.tolist() == data.counts.tolist()


def test_validation_is_held_out_of_train_class_by_class():
    whole, data = load(Source(imbalance=20)), load(Source(imbalance=20, validation=0.2))
    held = data.validation.labels.bincount()
    assert (data.counts + held).tolist() == whole.counts.tolist()
    assert held.tolist() == [20, 14, 10, 7, 5, 4, 3, 2, 1, 1]
    assert torch.equal(data.test.images, whole.test.images)


def picture(path: Path, color: tuple[int, int, int], size=(20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_list_file_with_spaces_in_paths(tmp_path):
    picture(tmp_path / "a folder" / "first image.png", (255, 0, 0))
    picture(tmp_path / "b.png", (0, 255, 0))
    listed = tmp_path / "train list.txt"
    listed.write_text("a folder/first image.png 0\n\nb.png 12\n")
    split = read_list(listed, tmp_path, classes=13)
    assert split.labels.tolist() == [0, 12]
    assert split.images[0] == tmp_path / "a folder" / "first image.png"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("b.png", ValueError, r"line 1: expected 'relative/path label'.*'b.png'"),
        ("b.png 0\nb.png one", ValueError, "line 2"),
        ("b.png -1", ValueError, "line 1"),
        ("b.png 0\ngone.png 1", FileNotFoundError, r"1 of 2 files.*gone\.png"),
    ],
)
def test_bad_list_file(tmp_path, text, error, message):
    picture(tmp_path / "b.png", (0, 0, 0))
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(error, match=message):
        read_list(tmp_path / "list.txt", tmp_path)


def lists(tmp_path, train, test):
    picture(tmp_path / "b.png", (0, 0, 0))
    for name, labels in (("train", train), ("test", test)):
        (tmp_path / name).write_text("".join(f"b.png {label}\n" for label in labels))
    return Source(data="list", root=tmp_path, train_list=tmp_path / "train", test_list=tmp_path / "test")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1], [0, 2], r"test, line 2: the label must lie in \[0, 2\), the training classes, got 2 for b\.png"),
        ([0, 2], [0], r"train, line 2: the label must lie in \[0, 2\), as each class needs an image"),
        ([0, 2, 2], [0], "every class must have training images, got none for 1 of 3 classes: 1$"),
        ([0, 0], [0], "at least 2 classes, got 1"),
        ([0, 1], [], "test must name images"),
    ],
)
def test_bad_labels(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        load(lists(tmp_path, train, test))


def test_lists_need_their_files(tmp_path):
    with pytest.raises(ValueError, match="root must be given for data 'list'"):
        load(Source(data="list"))
    with pytest.raises(FileNotFoundError, match="missing"):
        load(Source(data="list", root=tmp_path, train_list=tmp_path / "missing", test_list=tmp_path / "missing"))


@pytest.mark.parametrize("held", ["test", None])
def test_image_folder(tmp_path, held):
    for c, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        for i in range(10):
            picture(tmp_path / ("train" if held else "") / c / f"{i}.png", color)
        if held:
            picture(tmp_path / held / c / "t.png", color)
    data = load(Source(data="folder", root=tmp_path, imbalance=4))
    assert data.classes == ["cat", "dog"]
    assert data.counts.tolist() == ([10, 2] if held else [8, 2])
    assert len(data.test) == (2 if held else 4)
    assert not set(data.train.images) & set(data.test.images)
    batches = datasets.Batches(data.train, torch.device("cpu"), image_size=8, workers=0)
    images, labels = next(iter(batches(torch.tensor([[0, len(data.train) - 1]]), key=(0, 0))))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert images[0, :, 4, 4].tolist() == [255, 0, 0] and images[1, :, 4, 4].tolist() == [0, 0, 255]


def test_crops_of_files_depend_on_the_key_alone(tmp_path):
    gradient = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "g.png")
    split = Split([tmp_path / "g.png"] * 6, torch.arange(6))
    plan = torch.arange(6).view(3, 2)

    def crops(workers, first, key=(3, 1)):
        batches = datasets.Batches(split, torch.device("cpu"), 16, workers)
        return [images for images, _ in batches(plan, first, key)]

    whole = crops(0, 0)
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[0][0], whole[0][1])
    for workers, first in ((1, 0), (0, 2)):
        assert all(torch.equal(a, b) for a, b in zip(crops(workers, first), whole[first:], strict=True))
    assert not torch.equal(crops(0, 0, key=(3, 2))[0], whole[0])
    for seed in range(200):
        left, top, right, bottom = random_resized_crop(64, 48, np.random.default_rng(seed))
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 48
        assert 0.08 <= (right - left) * (bottom - top) / (64 * 48) <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(tmp_path, workers):
    picture(tmp_path / "whole.jpg", (0, 0, 0))
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    split = Split([tmp_path / "whole.jpg", tmp_path / "broken.jpg"], torch.tensor([0, 0]))
    batches = datasets.Batches(split, torch.device("cpu"), 8, workers)
    with pytest.raises(ValueError, match=r"broken\.jpg is not a readable image") as raised:
        next(batches.in_order(4))
    assert "\n" not in str(raised.value)  # no worker's traceback


def test_empty_class_folder_is_named(tmp_path):
    for i in range(5):
        picture(tmp_path / "cat" / f"{i}.png", (0, 0, 0))
    (tmp_path / "no dog").mkdir()
    with pytest.raises(ValueError, match=r"got none for 1 of 2 classes: no dog$"):
        load(Source(data="folder", root=tmp_path))


def test_every_image_once_for_evaluation():
    split = Split(torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), torch.arange(7))
    batches = datasets.Batches(split, torch.device("cpu"), 1, 0)
    assert torch.cat([images.flatten() for images, _ in batches.in_order(3)]).tolist() == list(range(7))


def npz(tmp_path, corrupt=False):
    random = np.random.default_rng(0)
    for part, per_class in (("train", 8), ("test", 2)):
        labels = np.repeat(np.arange(2, dtype=np.uint8), per_class)
        files = []
        for label in labels:
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 40, (32, 32, 3), dtype=np.uint8) + np.uint8(150 * label)).save(buffer, "JPEG")
            files.append(b"junk" if corrupt else buffer.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(tmp_path / f"cifar10-jpeg-{part}.npz", jpeg=jpeg, offsets=offsets, labels=labels, classes=np.array(["a", "b"]))


def test_jpeg_npz(tmp_path):
    npz(tmp_path)
    data = load(Source(data="cifar10-jpeg", root=tmp_path, imbalance=4))
    assert data.counts.tolist() == [8, 2] and data.classes == ["a", "b"] and data.train.images.shape == (10, 3, 32, 32)
    assert data.test.images[2:].float().mean() > data.test.images[:2].float().mean() + 100
    npz(tmp_path, corrupt=True)
    with pytest.raises(ValueError, match="image 0 is not a readable image"):
        load(Source(data="cifar10-jpeg", root=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mnist-63k\.npz does not exist"):
        load(Source(data="mnist", root=tmp_path))
    with pytest.raises(ValueError, match="root must be given for data 'mnist'"):
        load(Source(data="mnist"))


def test_fashion_mnist_from_root_checks_the_checksum(tmp_path, monkeypatch):
    import hashlib

    random = np.random.default_rng(0)
    for prefix, n in (("train", 20), ("t10k", 10)):
        labels = np.arange(n, dtype=np.uint8) % 10
        for kind, header, body in (("images-idx3", 16, random.integers(0, 255, n * 784, dtype=np.uint8)), ("labels-idx1", 8, labels)):
            blob = gzip.compress(bytes(header) + body.tobytes())
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(blob)
            monkeypatch.setitem(datasets.MD5, f"{prefix}-{kind}-ubyte.gz", hashlib.md5(blob).hexdigest())
    data = load(Source(data="fashion-mnist-lt", root=tmp_path, imbalance=2))
    assert data.counts.tolist() == [2] + [1] * 9 and data.test.images.shape == (10, 1, 28, 28)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz must have md5 .* got"):
        load(Source(data="fashion-mnist-lt", root=tmp_path))


def write_cifar(folder, monkeypatch, name):
    """An archive of CIFAR's layout with an image of random pixels for each class; its path, and the test images' pixels."""
    import hashlib
    import pickle
    import tarfile

    classes, fine = {"cifar-10": (10, "labels"), "cifar-100": (100, "fine_labels")}[name]
    pixels = np.random.default_rng(0).integers(0, 255, (classes, 3072), dtype=np.uint8)
    batch = {"data": pixels, fine: list(range(classes))}
    parts = {f"data_batch_{i}": batch for i in range(1, 6)} | {"test_batch": batch} if classes == 10 else {"train": batch, "test": batch}
    meta = {"batches.meta": {"label_names": [str(c) for c in range(10)]}, "meta": {"fine_label_names": [str(c) for c in range(100)]}}
    path = folder / f"{name}-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member, value in (parts | meta).items():
            blob = pickle.dumps(value)
            info = tarfile.TarInfo(f"folder/{member}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    monkeypatch.setitem(datasets.MD5, path.name, hashlib.md5(path.read_bytes()).hexdigest())
    return path, torch.from_numpy(pixels)


@pytest.mark.parametrize(("archive", "images", "classes"), [("cifar-10", 50, 10), ("cifar-100", 100, 100)])
def test_cifar_archive(tmp_path, monkeypatch, archive, images, classes):
    _, pixels = write_cifar(tmp_path, monkeypatch, archive)
    data = load(Source(data=f"{archive.replace('-', '')}-lt", root=tmp_path))
    assert len(data.train) == images and len(data.classes) == classes
    assert torch.equal(data.test.images[3].flatten(), pixels[3])


def test_download(tmp_path, monkeypatch, capfd):
    """From a server of our own: fetched once, kept in the cache, refused where the checksum differs or nothing answers."""
    import functools
    import http.server
    import threading

    import pooch

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = 0

        def log_message(self, *_):
            Handler.requests += 1

    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    path, pixels = write_cifar(served, monkeypatch, "cifar-100")
    monkeypatch.setattr(pooch, "os_cache", lambda _: cache)
    source = Source(data="cifar100-lt")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets, "CIFAR", f"http://127.0.0.1:{server.server_port}/")
        for _ in range(2):
            assert torch.equal(load(source).test.images[3].flatten(), pixels[3])
        assert Handler.requests == 1 and "100%" in capfd.readouterr().err  # the bar of the download
        monkeypatch.setitem(datasets.MD5, path.name, "0" * 32)
        with pytest.raises(ValueError, match=r"hash of downloaded file .* does not match"):
            load(source)
        server.shutdown()
    (cache / path.name).unlink()
    with pytest.raises(OSError, match=r"could not be downloaded .*127\.0\.0\.1.* --root"):
        load(source)
    assert list(cache.iterdir()) == []  # nothing half downloaded is left


def image_folder(root, classes=("cat", "dog"), images=4):
    for c, name in enumerate(classes):
        for i in range(images):
            picture(root / name / f"{i}.png", (40 * c, 10 * i, 0), size=(20 + c, 12 + i))
    return root


def differences(root, change):
    """What is said to differ when ``change`` was done to a copy of the folder."""
    import shutil

    other = shutil.copytree(root, root.parent / "other")
    change(other)
    was, now = (load(Source(data="folder", root=path)).fingerprint for path in (root, other))
    assert json.loads(json.dumps(was)) == was
    return datasets.describe_difference(was, now)


def exchange(root):
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (root / old).rename(root / new)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: None, []),
        (lambda root: picture(root / "cat" / "new.png", (0, 0, 0)), ["train: 7 images, were 6, cat has 4 images, had 3"]),
        (lambda root: (root / "dog" / "3.png").unlink(), ["train: 5 images, were 6, dog has 2 images, had 3"]),
        (lambda root: picture(root / "dog" / "2.png", (1, 2, 3), size=(90, 90)), ["other images (or sizes, paths, order) of dog"]),
        (lambda root: picture(root / "dog" / "2.png", (40, 21, 0), size=(21, 14)), ["other images (or sizes, paths, order) of dog"]),
        (lambda root: os.utime(root / "dog" / "2.png", (0, 0)), []),
        (exchange, ["other images (or sizes, paths, order) of cat, dog"]),
        (lambda root: (root / "cat").rename(root / "ant"), ["classes that were not there: ant", "classes that are gone: cat"]),
        (lambda root: image_folder(root, ["zebra"]), ["classes that were not there: zebra", "train: 9 images, were 6"]),
    ],
)
def test_other_data_is_told_apart(tmp_path, change, told):
    found = differences(image_folder(tmp_path / "data"), change)
    assert bool(found) == bool(told) and not any("order of the images" in line for line in found)
    for part in told:
        assert any(part in line for line in found), found


def test_uncompressed_images_exchanged_between_classes_are_other_data(tmp_path):
    for c, name in enumerate(("cat", "dog")):
        for i in range(150):
            picture(tmp_path / "data" / name / f"{i:03}.bmp", (c, i, 0), size=(4, 4))

    def swap(root):
        (root / "cat" / "149.bmp").rename(root / "x")
        (root / "dog" / "149.bmp").rename(root / "cat" / "149.bmp")
        (root / "x").rename(root / "dog" / "149.bmp")

    (told,) = differences(tmp_path / "data", swap)
    assert "other images (or sizes, paths, order) of cat, dog" in told


def test_other_settings_are_other_data():
    whole, tail, seeded = (load(images).fingerprint for images in (Source(), Source(imbalance=20), Source(data_seed=1)))
    assert datasets.describe_difference(whole, load(Source()).fingerprint) == []
    assert datasets.describe_difference(whole, tail)[0].startswith("train: 335 images, were 1000, 1 has 71 images, had 100, 2 has 51")
    assert len(datasets.describe_difference(whole, seeded)) == 2  # train and test
    assert datasets.describe_difference(whole, load(Source(validation=0.1)).fingerprint)[1] == "validation: none before, 100 now"
