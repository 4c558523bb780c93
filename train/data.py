"""The data sets, the long tail cut from them, and what tells one from another.

A data set is one entry of ``DATASETS``. ``load`` reads it; everything that can be wrong with its layout, lists and options is found there,
and everything that can be wrong with its image files by ``check_images``, both before training starts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from files import Batches, Files, ImageFiles, Split, decode, decoded
from folders import read_folder, read_list, repeated, some
from joblib import cpu_count  # of a container the CPUs that it may use
from torch import Tensor

__all__ = [
    "DATASETS", "Batches", "Data", "DataName", "DataSet", "Files", "ImageFiles", "Source", "Split", "decode", "decoded", "defaults",
    "describe_difference", "load", "long_tail", "long_tail_counts", "read_list", "shots",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where the images come from, and which tail is cut from them. ``defaults`` gives a data set's own."""

    data: DataName = "digits"  # all but digits need --root or a download
    root: Path | None = None  # folder of the data; None: download, where that is possible
    train_list: Path | None = None  # for data list: one "relative/path label" a line
    val_list: Path | None = None  # chooses the best epoch, as a fraction for validation does
    test_list: Path | None = None
    imbalance: float | None = None  # images of the largest class over those of the smallest; None: take all
    largest_class: int | None = None  # images of class 0; None: as many as the imbalance allows
    validation: float = 0.0  # fraction of each class's training images held out to choose the best epoch; 0: the last epoch is chosen
    data_seed: int = 0  # which images the long tail keeps and validation holds out; 0 is the field's convention
    image_size: int = 224  # side of images that are decoded from files
    workers: int = min(8, cpu_count())  # that decode files
    check: bool = True  # open every image file once before training
    skip_bad_images: bool = False  # leave out those that cannot be read, and say which
    many: int = 100  # many-shot: more training images than this
    few: int = 20  # few-shot: fewer than this


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set. A new one is an entry of ``DATASETS`` with a function that reads it."""

    what: str  # in a line
    read: Callable[[Source], Data]  # whole: load cuts the tail
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    shape: tuple[int, ...] | None  # channels, height, width; None: files, which image_size brings to size; (): features
    imbalance: float | None = 100.0
    many: int = 100
    few: int = 20
    root: Literal["required", "optional", "unused", "file"] = "required"  # optional: without it, downloaded; file: not a folder
    splits: dict[float, str] = field(default_factory=dict)  # the field's: split_hash by imbalance
    augment: str = "cifar"  # a name of AUGMENTATIONS
    psc_temperature: float = 0.1  # of the prototypical losses
    recipe: Mapping[str, Any] = field(default_factory=dict)  # settings of network and optimiser that are known to work


@dataclass
class Data:
    train: Split
    validation: Split | None
    test: Split
    classes: list[str]
    notes: list[str] = field(default_factory=list)  # what a person should know: splits found, what was ignored
    kept: np.ndarray | None = None  # int64: which images of the whole training set are in the tail, before validation is held out
    fingerprint: dict[str, Any] = field(default_factory=dict)  # JSON; what describe_difference compares

    @property
    def counts(self) -> Tensor:
        """Training images of each class."""
        return self.train.labels.bincount(minlength=len(self.classes))

    @property
    def split_hash(self) -> str:
        """Of the kept indices, in their order: SHA-256 of them as little-endian int64, 12 hex digits. Validation is cut from them later."""
        return _digest(self.kept.astype("<i8").tobytes())


def defaults(name: DataName, **changes: Any) -> Source:
    """A data set's own settings, with changes."""
    known = _known(name)
    return replace(Source(data=name, imbalance=known.imbalance, many=known.many, few=known.few), **changes)


def load(images: Source) -> Data:
    check_source(images)
    known = _known(images.data)
    data = known.read(images)
    if data.test is None:
        raise ValueError(f"data {images.data!r} must have a test split")
    complain_of_lacking(data)
    train, kept, validation, notes = data.train, data.kept, data.validation, list(data.notes)
    kept = np.arange(len(train)) if kept is None else kept
    if images.imbalance is not None:
        counts = long_tail_counts(data.counts.tolist(), images.imbalance, images.largest_class)
        tail = long_tail(train.labels.numpy(), counts, images.data_seed)
        train, kept = train[tail], kept[tail]
    if validation is not None and images.validation:
        raise ValueError(f"validation must be 0 where the data has a validation split of its own, got {images.validation}")
    if validation is None:
        train, validation = hold_out(train, images.validation, images.data_seed)
    whole = Data(train, validation, data.test, data.classes, notes, kept)
    if known.splits.get(images.imbalance) == whole.split_hash:
        notes.append(f"the long tail is the field's (LDAM's), split {whole.split_hash}")
    whole.fingerprint = fingerprint(whole)
    return replace(whole, train=decoded(train), validation=validation and decoded(validation), test=decoded(data.test))


def _known(name: str) -> DataSet:
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]


def check_source(images: Source) -> None:
    """Raises for what can be seen to be wrong before the data are read; an option that cannot act is an error, not dropped."""
    known = _known(images.data)
    check_root(images.data, images.root)
    if images.data != "list":
        for name in ("train_list", "val_list", "test_list"):
            if (value := getattr(images, name)) is not None:
                raise ValueError(f"{name} has a meaning for data 'list' only, got {value} for data {images.data!r}")
    if images.val_list is not None and images.validation:
        raise ValueError(f"validation must be 0 beside val_list, got {images.validation} and {images.val_list}")
    if images.largest_class is not None and images.imbalance is None:
        raise ValueError(f"largest_class has a meaning with imbalance only, got {images.largest_class} and imbalance None")
    if known.shape == () and images.image_size != Source.image_size:
        raise ValueError(f"image_size has no meaning for data {images.data!r}, which has no images, got {images.image_size}")
    if known.shape and images.image_size not in (Source.image_size, known.shape[-1]):
        side = known.shape[-1]
        raise ValueError(f"image_size has no meaning for data {images.data!r}, whose images have side {side}, got {images.image_size}")
    if images.skip_bad_images and not images.check:
        raise ValueError("skip_bad_images leaves out what check finds, got check False")
    if images.few > images.many:
        raise ValueError(f"few must be at most many, got few {images.few} and many {images.many}")
    if images.data == "list":
        for name in ("train_list", "test_list"):
            if getattr(images, name) is None:
                raise ValueError(f"{name} must be given for data 'list', got None")
        for name in ("train_list", "val_list", "test_list"):
            if (path := getattr(images, name)) is not None and not path.is_file():
                raise FileNotFoundError(f"{name} {path} must be a file, got {'a folder' if path.exists() else 'nothing there'}")


def check_root(data: str, root: Path | None) -> None:
    known = _known(data)
    if known.root == "unused" and root is not None:
        raise ValueError(f"root has no meaning for data {data!r}, which comes with scikit-learn, got {root}")
    if known.root in ("required", "file") and root is None:
        raise ValueError(f"root must be given for data {data!r}, got None")
    if known.root == "file":
        if not root.is_file():
            raise FileNotFoundError(f"root {root} must be a file, got {'a folder' if root.exists() else 'nothing there'}")
    elif root is not None and not root.is_dir():
        raise FileNotFoundError(f"root {root} must be a folder, got {'a file' if root.exists() else 'nothing there'}")


def complain_of_lacking(data: Data) -> None:
    classes = len(data.classes)
    if classes < 2:
        raise ValueError(f"the data must hold at least 2 classes, got {classes}{': ' if classes else ''}{', '.join(data.classes)}")
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if split is not None and len(split) == 0:
            raise ValueError(f"the {name} split must not be empty, got no image")
        if split is not None and (label := int(split.labels.max())) >= classes:
            raise ValueError(f"labels of the {name} split must lie in [0, {classes}), the training classes, got {label}")
    if empty := [name for name, count in zip(data.classes, data.counts.tolist(), strict=True) if count == 0]:
        raise ValueError(f"every class must have training images, got none for {len(empty)} of {classes} classes: {', '.join(empty[:10])}")


# ---- what tells one data set from another


def fingerprint(data: Data) -> dict[str, Any]:
    """Classes, and of each split the number of images, their bytes and a digest for each class.

    That is of its tensors or encoded images. Of files it is of their paths below their folder, their sizes, and the first 4,096 bytes of a
    class's first 100 and of each that has the size of another, as uncompressed ones do: reading all would take minutes. Moved to another
    root, with other times, they are the same data.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    parts = {name: split and _fingerprint(split, len(data.classes)) for name, split in splits.items()}
    return {"classes": data.classes, "split": data.split_hash, **parts}


def _fingerprint(split: Split, classes: int) -> dict[str, Any]:
    order = split.labels.argsort(stable=True).numpy()
    counts = split.labels.bincount(minlength=classes).tolist()
    digests, size = [], 0
    for members in np.split(order, np.cumsum(counts)[:-1]):
        content, part = _content(split[members].images) if len(members) else (b"", 0)
        digests.append(_digest(content))
        size += part
    labels = _digest(split.labels.numpy().astype("<i8").tobytes())
    return {"images": len(split), "bytes": size, "labels": labels, "counts": counts, "digests": digests}


def _content(images: Tensor | Files | list) -> tuple[bytes, int]:
    """What is digested of a class's images, and the images' size in bytes."""
    if isinstance(images, Tensor):
        return repr((images.dtype, images.shape)).encode() + images.numpy().tobytes(), images.nbytes
    if isinstance(images, Files):
        sizes = [images.size(i) for i in range(len(images))]
        of_size = Counter(sizes)
        begun = [_beginning(images[i]) for i, size in enumerate(sizes) if i < 100 or of_size[size] > 1]
        return b"\0".join([*begun, *(b"%b %d" % (images.name(i), size) for i, size in enumerate(sizes))]), sum(sizes)
    return b"".join(images), sum(map(len, images))


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(4096)).digest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def describe_difference(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, a sentence each; none where they are of the same data."""
    if was == now:
        return []
    told = []
    for what, names in (
        ("classes that were not there", [c for c in now["classes"] if c not in set(was["classes"])]),
        ("classes that are gone", [c for c in was["classes"] if c not in set(now["classes"])]),
    ):
        if names:
            told.append(f"{what}: {some(names)}")
    if not told and was["classes"] != now["classes"]:
        told.append("the classes have another order")
    for split in ("train", "validation", "test"):
        old, new = was[split], now[split]
        if (old is None) != (new is None):
            told.append(f"{split}: {'none' if old is None else old['images']} before, {'none' if new is None else new['images']} now")
        elif old is not None and old != new and (what := _describe(was["classes"], old, now["classes"], new)):
            told.append(f"{split}: {what}")
    return told or [f"the split was {was['split']} and is {now['split']}"]


def _describe(were: list[str], old: dict[str, Any], are: list[str], new: dict[str, Any]) -> str:
    then = dict(zip(were, zip(old["counts"], old["digests"], strict=True), strict=True))
    told, others = [], []
    for name, count, digest in zip(are, new["counts"], new["digests"], strict=True):
        if name in then and then[name][0] != count:
            told.append(f"{name} has {count} images, had {then[name][0]}")
        elif name in then and then[name][1] != digest:
            others.append(name)
    if old["images"] != new["images"]:
        told.insert(0, f"{new['images']} images, were {old['images']}")
    if others:
        told.append(f"other images (or sizes, paths, order) of {some(others)}")
    if not told and were == are:
        told.append("the order of the images is another")
    return some(told)  # nothing, where it is the classes' names that differ


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


def _digits(images: Source) -> Data:
    """scikit-learn's bundled digits: 100 images of each class to train with, the 797 others are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(15).to(torch.uint8)[:, None]  # 0 ... 16 -> 0 ... 240
    everything = Split(pixels, torch.from_numpy(bunch.target).long())
    pool = long_tail(bunch.target, [100] * 10, images.data_seed)
    rest = np.setdiff1d(np.arange(len(everything)), pool)
    return Data(everything[pool], None, everything[rest], [str(d) for d in range(10)], kept=pool)


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
    def read(images: Source) -> Data:
        with tarfile.open(fetch(CIFAR, archive, images.root)) as tar:  # pickles, from an archive whose checksum was verified
            files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}

            def parts(names: list[str]) -> Split:
                batches = [pickle.load(tar.extractfile(files[name]), encoding="latin1") for name in names]
                pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
                return Split(torch.from_numpy(pixels), torch.tensor([label for batch in batches for label in batch[fine]]))

            names = pickle.load(tar.extractfile(files[meta]), encoding="latin1")["fine_label_names" if "fine" in fine else "label_names"]
            return Data(parts(trains), None, parts([test]), list(names))

    return read


def _fashion_mnist(images: Source) -> Data:
    def part(prefix: str) -> Split:
        raw, labels = (
            gzip.decompress(fetch(FASHION, f"{prefix}-{kind}-ubyte.gz", images.root).read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        )
        pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())
        return Split(pixels, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)))

    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return Data(part("train"), None, part("t10k"), classes)


def _npz(root: Path, name: str) -> np.lib.npyio.NpzFile:
    path = _existing(root / name, "an .npz of images")
    try:
        return np.load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} must be an .npz file: {error}") from error


def _cifar10_jpeg(images: Source) -> Data:
    """CIFAR-10 as JPEG files end to end (lossy copies): image i is jpeg[offsets[i] : offsets[i + 1]]."""

    def part(name: str) -> tuple[Split, list[str]]:
        with _npz(images.root, name) as file:
            jpeg, offsets = file["jpeg"], file["offsets"].tolist()
            encoded = [jpeg[a:b].tobytes() for a, b in pairwise(offsets)]
            return Split(encoded, torch.from_numpy(file["labels"].astype(np.int64))), [str(c) for c in file["classes"]]

    (train, classes), (test, _) = part("cifar10-jpeg-train.npz"), part("cifar10-jpeg-test.npz")
    return Data(train, None, test, classes)


def _mnist(images: Source) -> Data:
    with _npz(images.root, "mnist-63k.npz") as file:
        train, test = (
            Split(torch.from_numpy(file[f"{part}_images"])[:, None], torch.from_numpy(file[f"{part}_labels"].astype(np.int64)))
            for part in ("train", "test")
        )
    return Data(train, None, test, [str(d) for d in range(10)])


def _folder(images: Source) -> Data:
    """As read_folder finds it. Without a test split, validation is the test set; without both, each class gives a fifth to it."""
    found = read_folder(images.root)
    train, validation, test = (found.splits.get(name) for name in ("train", "validation", "test"))
    kept = None
    if test is None and validation is not None:
        test, validation = validation, None
        found.notes.append("no test split: the validation split is the test set")
    elif test is None:
        if len(train) == 0:
            raise ValueError(f"root {images.root} must hold images, got none{': ' if found.notes else ''}{'; '.join(found.notes)}")
        whole = Data(train, None, train, found.classes)
        complain_of_lacking(whole)
        labels = train.labels.numpy()
        held = long_tail(labels, [min(n - 1, max(1, round(n / 5))) for n in whole.counts.tolist()], images.data_seed)
        kept = np.setdiff1d(np.arange(len(labels)), held)
        train, test = train[kept], train[held]
        found.notes.append(f"no test split: a fifth of each class, {len(test)} images, is the test set")
    return Data(train, validation, test, found.classes, found.notes, kept)


def _lists(images: Source) -> Data:
    train = read_list(images.train_list, images.root)
    classes = int(train.labels.max()) + 1
    test = read_list(images.test_list, images.root, classes)
    validation = None if images.val_list is None else read_list(images.val_list, images.root, classes)
    notes = repeated({"train": train, "test": test} | ({} if validation is None else {"validation": validation}))
    return Data(train, validation, test, [str(c) for c in range(classes)], notes)


def _features(images: Source) -> Data:
    """What features.py wrote: float16 or float32 [N, F] of each split, and which images of the whole training set they are of."""
    try:
        with np.load(images.root) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:  # of a file cut short, zipfile's, zlib's or numpy's
        raise ValueError(f"{images.root} must be a whole file of features.py: {error}") from error
    if lacking := {"about", "classes", "kept", "train", "train_labels", "test", "test_labels"} - found.keys():
        raise ValueError(f"{images.root} must be a file of features.py, and lacks {', '.join(sorted(lacking))}")
    splits = {}
    for name in ("train", "validation", "test"):
        if name in found:
            features, labels = torch.from_numpy(found[name]), torch.from_numpy(found[f"{name}_labels"])
            if features.ndim != 2 or not features.is_floating_point() or labels.shape != features.shape[:1]:
                raise ValueError(f"{images.root} must hold floats [N, F] and labels [N] of {name}, got {features.shape}, {labels.shape}")
            splits[name] = Split(features, labels)
    about = json.loads(str(found["about"]))
    note = f"features of {about['network']} (weights {about['weights']}), of data {about['data']}, split {about['split']}"
    return Data(splits["train"], splits.get("validation"), splits["test"], found["classes"].tolist(), [note], found["kept"])


# ---- the table

# split_hash of the tails that LDAM's code keeps, by imbalance. They follow from the order of the labels alone: that of CIFAR's archives,
# and for the JPEG copies sorted by class, where each class keeps the same images.
SPLITS: dict[str, dict[float, str]] = {
    "cifar10-lt": {100: "4bf45bff8878", 50: "d7edcfaf0277", 10: "a17d69f192b1"},
    "cifar100-lt": {100: "e0d58a4d2700", 50: "561fa940cc7d", 10: "b4fbf1bf0a7f"},
    "cifar10-jpeg": {100: "f5a6ab138b23", 50: "99be59da760d", 10: "626815551d34"},
}

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "shape": (3, 32, 32)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "shape": None, "imbalance": None}

# CIFAR: the paper's settings. Digits: chosen on seeds that no reported figure uses.
PAPER = {
    "network": "resnet32", "hidden": 64, "embedding": 128, "epochs": 200, "batch": 512, "lr": 0.5, "warmup": 0.0, "milestones": (0.6, 0.8),
    "nesterov": False, "weight_decay": 1e-4,
}  # fmt: skip
FILES = {
    "augment": "files", "recipe": PAPER | {
        "network": "resnet50", "hidden": 2048, "epochs": 90, "batch": 128, "lr": 0.1, "milestones": (), "nesterov": True,
        "weight_decay": 5e-4,
    },
}  # fmt: skip
SMALL = {
    "augment": "digits", "psc_temperature": 0.5, "recipe": PAPER | {
        "network": "resnet8", "hidden": 128, "embedding": 64, "epochs": 53, "batch": 64, "lr": 0.1, "warmup": 0.05, "milestones": (),
        "nesterov": True, "weight_decay": 5e-4,
    },
}  # fmt: skip

# Heads on features that stay: chosen on those of a ResNet-32.
HEADS = PAPER | {
    "network": "mlp", "width": 512, "hidden": 512, "epochs": 25, "lr": 0.1, "warmup": 0.05, "milestones": (), "weight_decay": 5e-4,
}  # fmt: skip

DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        "scikit-learn's 8 x 8 digits, 1,000 to train with; no download",
        _digits, mean=(0.3,), std=(0.38,), shape=(1, 8, 8), imbalance=20.0, many=40, few=15, root="unused", **SMALL,
    ),
    "mnist": DataSet("MNIST from root/mnist-63k.npz", _mnist, mean=(0.1307,), std=(0.3081,), shape=(1, 28, 28), **SMALL),
    "fashion-mnist-lt": DataSet(
        "Fashion-MNIST, downloaded or from root",
        _fashion_mnist, mean=(0.2860,), std=(0.3530,), shape=(1, 28, 28), root="optional", recipe=PAPER,
    ),
    "cifar10-lt": DataSet(
        "CIFAR-10, downloaded or from root/cifar-10-python.tar.gz",
        _cifar("cifar-10-python.tar.gz", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "labels"),
        **CIFAR10, root="optional", splits=SPLITS["cifar10-lt"], psc_temperature=1.0, recipe=PAPER,
    ),
    "cifar100-lt": DataSet(
        "CIFAR-100, downloaded or from root/cifar-100-python.tar.gz",
        _cifar("cifar-100-python.tar.gz", ["train"], "test", "meta", "fine_labels"),
        **CIFAR10, root="optional", splits=SPLITS["cifar100-lt"], recipe=PAPER,
    ),
    "cifar10-jpeg": DataSet(
        "CIFAR-10 as lossy JPEG copies, from root/cifar10-jpeg-*.npz: not CIFAR-10's figures",
        _cifar10_jpeg, **CIFAR10, splits=SPLITS["cifar10-jpeg"], psc_temperature=1.0, recipe=PAPER,
    ),
    "folder": DataSet("image files, a folder for each class under root, with or without splits", _folder, **IMAGENET, **FILES),
    "list": DataSet("image files under root that train_list and test_list name with their labels", _lists, **IMAGENET, **FILES),
    "features": DataSet(
        "features of a frozen network, from the file root that features.py wrote",
        _features, mean=(0.0,), std=(1.0,), shape=(), imbalance=None, root="file", augment="none", recipe=HEADS,
    ),
}  # fmt: skip

if TYPE_CHECKING:
    DataName = str
else:
    DataName = Literal[tuple(DATASETS)]  # what a command line takes for Source.data
