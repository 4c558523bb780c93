"""The data sets, and the long tail cut from them.

A split is labels and images. Images are either one uint8 tensor [N, C, H, W], which then lives on the device, or paths, which worker
processes decode. Everything that can be wrong with the files is found here, before training starts.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DataName = Literal["digits", "fashion-mnist-lt", "cifar10-lt", "cifar100-lt", "cifar10-jpeg", "mnist", "folder", "list"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass
class Split:
    images: Tensor | list  # uint8 [N, C, H, W]; or Paths; or, until decoded, the bytes of image files
    labels: Tensor  # int64 [N], on the CPU

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> Split:
        images = self.images[indices] if isinstance(self.images, Tensor) else [self.images[i] for i in indices]
        return Split(images, self.labels[indices])

    @property
    def images_are_pictures(self) -> bool:
        return not isinstance(self.images, Tensor) or self.images.dim() == 4

    @property
    def channels(self) -> int:
        return self.images.shape[1] if isinstance(self.images, Tensor) else 3


@dataclass
class Data:
    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    notes: tuple = ()
    split_hash: str = ""

    @property
    def counts(self) -> Tensor:
        """Training images of each class."""
        return self.train.labels.bincount(minlength=len(self.classes))


@dataclass(frozen=True)
class Images:
    data: str = "digits"
    root: Path | None = None
    train_list: Path | None = None
    val_list: Path | None = None
    test_list: Path | None = None
    imbalance: float | None = None
    largest_class: int | None = None
    validation: float = 0.0
    image_size: int = 224
    workers: int = 8
    data_seed: int = 0
    many: int = 100
    few: int = 20


@dataclass(frozen=True)
class DataSet:
    imbalance: float | None
    mean: tuple
    std: tuple
    many: int
    few: int
    augment: str
    psc_temperature: float
    recipe: dict


CIFAR_R = {
    "network": "resnet32",
    "hidden": 64,
    "embedding": 128,
    "epochs": 200,
    "batch": 512,
    "lr": 0.5,
    "warmup": 0.0,
    "milestones": (0.6, 0.8),
    "nesterov": False,
    "weight_decay": 1e-4,
}
FILES_R = CIFAR_R | {
    "network": "resnet50",
    "hidden": 2048,
    "epochs": 90,
    "batch": 128,
    "lr": 0.1,
    "milestones": (),
    "weight_decay": 5e-4,
    "nesterov": True,
}
DIGITS_R = CIFAR_R | {
    "network": "resnet8",
    "hidden": 128,
    "embedding": 64,
    "epochs": 53,
    "batch": 64,
    "lr": 0.1,
    "warmup": 0.05,
    "milestones": (),
    "nesterov": True,
    "weight_decay": 5e-4,
}
RGB = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
INET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS = {
    "digits": DataSet(20, (0.3,), (0.38,), 40, 15, "digits", 0.5, DIGITS_R),
    "mnist": DataSet(100, (0.1307,), (0.3081,), 100, 20, "digits", 0.5, DIGITS_R),
    "fashion-mnist-lt": DataSet(100, (0.2860,), (0.3530,), 100, 20, "cifar", 0.1, CIFAR_R),
    "cifar10-lt": DataSet(100, *RGB, 100, 20, "cifar", 1.0, CIFAR_R),
    "cifar10-jpeg": DataSet(100, *RGB, 100, 20, "cifar", 1.0, CIFAR_R),
    "cifar100-lt": DataSet(100, *RGB, 100, 20, "cifar", 0.1, CIFAR_R),
    "folder": DataSet(None, *INET, 100, 20, "files", 0.1, FILES_R),
    "list": DataSet(None, *INET, 100, 20, "files", 0.1, FILES_R),
}


def load(source: Images) -> Data:
    data = LOADERS[source.data](source)
    _check(data)
    train = data.train
    if source.imbalance is not None:
        counts = long_tail_counts(data.counts.tolist(), source.imbalance, source.largest_class)
        train = train[long_tail(train.labels.numpy(), counts, source.data_seed)]
    validation = data.validation
    if validation is None:
        train, validation = hold_out(train, source.validation, source.data_seed)
    return Data(decoded(train), validation and decoded(validation), decoded(data.test), data.classes)


def _check(data: Data) -> None:
    classes = len(data.classes)
    if classes < 2:
        raise ValueError(f"the data must hold at least 2 classes, got {classes}")
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split is not None and len(split) == 0:
            raise ValueError(f"the {name} split must not be empty, got no image")
        if split is not None and (label := int(split.labels.max())) >= classes:
            image = "" if isinstance(split.images, Tensor) else f" for {split.images[split.labels.argmax()]}"
            raise ValueError(f"labels of the {name} split must lie in [0, {classes}), the training classes, got {label}{image}")
    if empty := [name for name, count in zip(data.classes, data.counts.tolist(), strict=True) if count == 0]:
        raise ValueError(f"every class must have training images, got none for {len(empty)} of {classes} classes: {', '.join(empty[:10])}")


# ---- the long tail


def long_tail_counts(sizes: Sequence[int], imbalance: float, largest: int | None = None) -> list[int]:
    """n_i = int(n_max (1 / IF)^(i / (C - 1))), classes in order. n_max: ``largest``, or the most that the sizes at hand allow."""
    if not imbalance >= 1:
        raise ValueError(f"imbalance must be at least 1, got {imbalance}")
    shape = [(1 / imbalance) ** (i / max(1, len(sizes) - 1)) for i in range(len(sizes))]
    n_max = min(size / share for size, share in zip(sizes, shape, strict=True)) if largest is None else largest
    counts = [int(n_max * share) for share in shape]
    for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if not 1 <= count <= size:
            raise ValueError(
                f"largest_class and imbalance ask for {count} images of class {i}, expected 1 to {size}, which is what there is: "
                f"got largest_class {largest}, imbalance {imbalance:g}"
            )
    return counts


def long_tail(labels: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """The indices kept: class by class, shuffled, the first n_i. The field's convention is seed 0."""
    random = np.random.RandomState(seed)
    kept = []
    for c, count in enumerate(counts):
        indices = np.flatnonzero(labels == c)
        random.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)


def hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    if not 0 <= fraction < 1:
        raise ValueError(f"validation must be a fraction in [0, 1), got {fraction}")
    if fraction == 0:
        return train, None
    sizes = train.labels.bincount().tolist()
    held = long_tail(train.labels.numpy(), [min(n - 1, max(1, round(fraction * n))) for n in sizes], seed)
    if len(held) == 0:
        raise ValueError(f"validation {fraction} must leave an image to hold out, got classes of one image only")
    return train[np.setdiff1d(np.arange(len(train)), held)], train[held]


def shots(counts: Tensor, many: int, few: int) -> dict[str, Tensor]:
    """Which classes are many-shot (more than ``many`` training images), few-shot (fewer than ``few``), and medium: both ends included."""
    return {"many": counts > many, "medium": (counts >= few) & (counts <= many), "few": counts < few}


# ---- the data sets


def _digits(source: Images) -> Data:
    """scikit-learn's bundled digits: 100 images of each class to train with, the 797 others are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(15).to(torch.uint8)[:, None]  # 0 ... 16 -> 0 ... 240
    everything = Split(images, torch.from_numpy(bunch.target).long())
    pool = long_tail(bunch.target, [100] * 10, source.data_seed)
    rest = np.setdiff1d(np.arange(len(everything)), pool)
    return Data(everything[pool], None, everything[rest], [str(d) for d in range(10)])


CIFAR = "https://www.cs.toronto.edu/~kriz/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def fetch(base: str, name: str, root: Path | None) -> Path:
    """The file from ``root``, or downloaded into the user's cache; its checksum holds either way."""
    import pooch

    if root is None:
        try:
            return Path(pooch.retrieve(base + name, f"md5:{MD5[name]}", fname=name, path=pooch.os_cache("fastsupcon"), progressbar=True))
        except OSError as error:
            raise OSError(f"{name} could not be downloaded ({error}); with the file in a folder of yours, name that by --root") from error
    path = _existing(root / name, f"the file of {base}{name}")
    if (found := pooch.file_hash(path, alg="md5")) != MD5[name]:
        raise ValueError(f"{path} must have md5 {MD5[name]}, got {found}: incomplete or another file")
    return path


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, expected {what}")
    return path


def _cifar(archive: str, trains: list[str], test: str, meta: str, fine: str) -> Callable:
    def read(source: Images) -> Data:
        with tarfile.open(fetch(CIFAR, archive, source.root)) as tar:  # pickles, from an archive whose checksum was verified
            files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}

            def parts(names: list[str]) -> Split:
                batches = [pickle.load(tar.extractfile(files[name]), encoding="latin1") for name in names]
                images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
                return Split(torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch[fine]]))

            names = pickle.load(tar.extractfile(files[meta]), encoding="latin1")["fine_label_names" if "fine" in fine else "label_names"]
            return Data(parts(trains), None, parts([test]), list(names))

    return read


def _fashion_mnist(source: Images) -> Data:
    def part(prefix: str) -> Split:
        images, labels = (
            gzip.decompress(fetch(FASHION, f"{prefix}-{kind}-ubyte.gz", source.root).read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        )
        pixels = torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
        return Split(pixels, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)))

    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return Data(part("train"), None, part("t10k"), classes)


def _npz(root: Path | None, name: str) -> np.lib.npyio.NpzFile:
    if root is None:
        raise ValueError(f"root must be the folder that holds {name}, got None")
    path = _existing(root / name, "an .npz of images")
    try:
        return np.load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} must be an .npz file: {error}") from error


def _cifar10_jpeg(source: Images) -> Data:
    """CIFAR-10 as JPEG files end to end (lossy copies): image i is jpeg[offsets[i] : offsets[i + 1]]."""

    def part(name: str) -> tuple[Split, list[str]]:
        with _npz(source.root, name) as file:
            jpeg, offsets = file["jpeg"], file["offsets"].tolist()
            images = [jpeg[a:b].tobytes() for a, b in pairwise(offsets)]
            return Split(images, torch.from_numpy(file["labels"].astype(np.int64))), [str(c) for c in file["classes"]]

    (train, classes), (test, _) = part("cifar10-jpeg-train.npz"), part("cifar10-jpeg-test.npz")
    return Data(train, None, test, classes)


def _mnist(source: Images) -> Data:
    with _npz(source.root, "mnist-63k.npz") as file:
        train, test = (
            Split(torch.from_numpy(file[f"{part}_images"])[:, None], torch.from_numpy(file[f"{part}_labels"].astype(np.int64)))
            for part in ("train", "test")
        )
    return Data(train, None, test, [str(d) for d in range(10)])


def _folder(source: Images) -> Data:
    """root/train/CLASS/image and root/test (or val) likewise; or root/CLASS/image, of which each class gives a fifth to the test set."""
    if source.root is None:
        raise ValueError("root must be a folder of images for data 'folder', got None")
    root = source.root
    held = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    train_root = root / "train" if held else root
    classes = sorted(path.name for path in _existing(train_root, "one folder for each class").iterdir() if path.is_dir())

    def part(folder: Path) -> Split:
        paths, labels = [], []
        for c, name in enumerate(classes):
            found = sorted(p for p in _existing(folder / name, "a class's folder").rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            paths += found
            labels += [c] * len(found)
        return Split(paths, torch.tensor(labels, dtype=torch.int64))

    train = part(train_root)
    if held:
        return Data(train, None, part(held), classes)
    train, test = hold_out(train, 0.2, source.data_seed)
    return Data(train, None, test, classes)


def read_list(path: Path, root: Path) -> Split:
    """One ``relative/path label`` a line; the label is what follows the last space, so paths may hold spaces."""
    paths, labels = [], []
    for number, line in enumerate(_existing(path, "a list file").read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{path}, line {number}: expected 'relative/path label' with a label from 0, got {line!r}")
        paths.append(root / name)
        labels.append(int(label))
    if missing := [p for p in paths if not p.is_file()]:
        raise FileNotFoundError(f"{path} names {len(missing)} of {len(paths)} files that do not exist under {root}, first {missing[0]}")
    return Split(paths, torch.tensor(labels, dtype=torch.int64))


def _lists(source: Images) -> Data:
    for name in ("root", "train_list", "test_list"):
        if getattr(source, name) is None:
            raise ValueError(f"{name} must be given for data 'list', got None")
    train, test = read_list(source.train_list, source.root), read_list(source.test_list, source.root)
    validation = None if source.val_list is None else read_list(source.val_list, source.root)
    return Data(train, validation, test, [str(c) for c in range(int(train.labels.max()) + 1 if len(train) else 0)])


LOADERS = {
    "digits": _digits,
    "fashion-mnist-lt": _fashion_mnist,
    "cifar10-lt": _cifar("cifar-10-python.tar.gz", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "labels"),
    "cifar100-lt": _cifar("cifar-100-python.tar.gz", ["train"], "test", "meta", "fine_labels"),
    "cifar10-jpeg": _cifar10_jpeg,
    "mnist": _mnist,
    "folder": _folder,
    "list": _lists,
}


# ---- from files to batches


def decode(source: Path | bytes, name: str) -> Image.Image:
    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error


def decoded(split: Split) -> Split:
    if isinstance(split.images, Tensor) or isinstance(split.images[0], Path):
        return split
    pixels = np.stack([np.asarray(decode(image, f"image {i}")) for i, image in enumerate(split.images)])
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), split.labels)


class ImageFiles(Dataset):
    """Decoded and brought to size in a worker: a random resized crop to train with, or the middle of the image.

    The crop's randomness is a function of the key that comes with the index, so it depends neither on the workers nor on where a run
    was resumed.
    """

    def __init__(self, split: Split, size: int) -> None:
        self.paths, self.size = split.images, size

    def __getitem__(self, item: tuple[int, tuple[int, ...] | None]) -> Tensor | ValueError:
        index, key = item
        try:
            image = decode(self.paths[index], str(self.paths[index]))
        except ValueError as error:  # raised by Batches: out of a worker it would come with the worker's traceback as its message
            return error
        box = middle(*image.size) if key is None else random_resized_crop(*image.size, np.random.default_rng(key))
        small = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def random_resized_crop(width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    """8 to 100 % of the area, sides 3:4 to 4:3: the box (left, top, right, bottom)."""
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.08, 1), np.exp(random.uniform(-1, 1) * np.log(4 / 3))
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    return middle(width, height)


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    """What resizing the short side to 256 and cutting 224 from the centre keeps, whatever the size asked for."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def stack(images: list[Tensor | ValueError]) -> Tensor | ValueError:
    return next((image for image in images if isinstance(image, ValueError)), None) or torch.stack(images)


def leave_process_group(_worker: int) -> None:
    """Ctrl-C, and often SIGTERM, reach the whole process group, but the step at hand still needs its images."""
    os.setpgrp()


class KeyedRows:
    """A batch sampler for :class:`ImageFiles`: the given columns of the plan at hand, row by row, each index with the key of its crop."""

    plan: Tensor
    columns: list[int]
    first = 0
    key: tuple[int, ...] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...] | None]]]:
        for row, indices in enumerate(self.plan[self.first :].tolist(), self.first):
            yield [(indices[n], None if self.key is None else (*self.key, row, n)) for n in self.columns]


class Batches:
    """uint8 images and labels on the device: one batch for each row of a plan of indices [batches, size]."""

    def __init__(self, split: Split, device: torch.device, image_size: int, workers: int) -> None:
        self.device, self.labels = device, split.labels.to(device)
        self.resident = split.images.to(device) if isinstance(split.images, Tensor) else None
        if self.resident is None:
            self.rows = KeyedRows()
            options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
            options["worker_init_fn"] = leave_process_group
            options["generator"] = torch.Generator()  # or the loader would draw from the generator that augments
            self.loader = DataLoader(ImageFiles(split, image_size), batch_sampler=self.rows, collate_fn=stack, **options)

    def __call__(
        self, plan: Tensor, first: int = 0, key: tuple[int, ...] | None = None, columns: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From row ``first`` on, of each the given columns. ``key`` seeds the crops of files; None takes the middle."""
        columns = torch.arange(plan.shape[1]) if columns is None else columns
        rows = plan[first:, columns].to(self.device)
        if self.resident is not None:
            for indices in rows:
                yield self.resident[indices], self.labels[indices]
            return
        self.rows.plan, self.rows.columns, self.rows.first, self.rows.key = plan, columns.tolist(), first, key
        for indices, images in zip(rows, self.loader, strict=True):
            if isinstance(images, ValueError):
                raise images
            yield images.to(self.device, non_blocking=True), self.labels[indices]

    def in_order(self, size: int, part: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, or every one of a part, for evaluation."""
        indices = torch.arange(len(self.labels)) if part is None else torch.arange(part.start, part.stop)
        whole = len(indices) // size * size
        yield from self(indices[:whole].view(-1, size))
        if whole < len(indices):
            yield from self(indices[None, whole:])
