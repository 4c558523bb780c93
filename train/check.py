"""Every image file opened once before training, so that a broken one costs a minute and not a night."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
from data import Data, complain_of_lacking, fingerprint
from files import Files, Split, is_16_bit, loader_options, naming, patient, to_rgb
from folders import some
from PIL import Image
from torch.utils.data import DataLoader, Dataset

AT_ONCE = 64  # images between two reports of a worker


def check_images(
    data: Data,
    workers: int,
    *,
    skip_bad: bool = False,
    cache: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    stopped: Callable[[], object] = lambda: False,
) -> Data:
    """The same data, all of whose files are readable images; images that are in memory already were decoded when they were loaded.

    A ValueError names the first files that are not, and how many there are; with ``skip_bad`` they are left out and named in the notes.
    Images of 16 bits that all keep to their lowest 14 are a ValueError too. ``progress(done, total)`` is called as it goes. Files found
    whole are remembered in the folder ``cache`` (None: the user's cache) by path, size and times of change, and not opened again.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {name: split for name, split in splits.items() if split is not None and isinstance(split.images, Files)}
    if not splits:
        return data
    if cache is None:
        import pooch

        cache = Path(pooch.os_cache("fastsupcon"))
    known = cache / f"images-{PIL.__version__}.npy"
    keys = {name: _keys(split.images) for name, split in splits.items()}
    whole = _remembered(known)
    unknown = {name: np.flatnonzero(~np.isin(keys[name] | FLAGS, whole | FLAGS)) for name in splits}
    notes, total, done, found, bad = list(data.notes), sum(map(len, unknown.values())), 0, [], {}
    try:
        for name, split in splits.items():
            bad[name] = []
            opened = _open(split.images.take(unknown[name]), workers, stopped)
            for index, (problem, flags) in zip(unknown[name].tolist(), opened, strict=True):
                if problem:
                    bad[name].append((index, problem))
                else:
                    found.append((keys[name][index] & ~FLAGS) | np.uint64(flags))
                done += 1
                if done % AT_ONCE == 0 or done == total:
                    progress(done, total)
    finally:  # a check that is stopped goes on from there
        whole = np.union1d(whole, np.array(found, np.uint64))
        if found:
            try:
                _remember(known, whole)
            except OSError as error:
                notes.append(f"the images will be opened again next time: {error}")
    problems = [problem for pairs in bad.values() for _, problem in pairs]
    images = sum(map(len, splits.values()))
    if problems and not skip_bad:
        raise ValueError(f"{len(problems)} of {images} images cannot be read: {some(problems, 3)}")
    if problems:
        notes.append(f"left out {len(problems)} of {images} images, which cannot be read: {some(problems)}")
    here = whole[np.isin(whole | FLAGS, np.concatenate(list(keys.values())) | FLAGS)]
    several, deep, dark = (int((here & np.uint64(flag) != 0).sum()) for flag in (SEVERAL, DEEP, DARK))
    if deep and dark == deep:
        raise ValueError(
            f"images of 16 bits must use their range, and all {deep} lie in its lowest quarter, as those of 14 or 12 bits: they would come "
            "in nearly black; bring their white to 65535, or take them as they are without this check"
        )
    if several:
        notes.append(f"{several} images hold several frames, of which the first is taken")
    if not problems:
        return replace(data, notes=notes)
    left = {name: _without(split, [index for index, _ in bad[name]]) for name, split in splits.items()}
    data = replace(data, **left, notes=notes)
    complain_of_lacking(data)
    return replace(data, fingerprint=fingerprint(data))


# The lowest bits of a key say what the file holds: several frames; 16 bits a pixel; and of these none above a quarter of their range.
SEVERAL, DEEP, DARK = 1, 2, 4
FLAGS = np.uint64(SEVERAL | DEEP | DARK)


def _remembered(known: Path) -> np.ndarray:
    """The keys of files that were found whole. A file of them that cannot be read is as none: it is written anew."""
    try:
        keys = np.load(known)
    except (OSError, ValueError, EOFError):
        keys = None
    return keys if isinstance(keys, np.ndarray) and keys.dtype == np.uint64 and keys.ndim == 1 else np.zeros(0, np.uint64)


def _remember(known: Path, keys: np.ndarray) -> None:
    known.parent.mkdir(parents=True, exist_ok=True)
    unfinished = known.with_name(f"unfinished-{os.getpid()}.npy")
    np.save(unfinished, keys)
    os.replace(unfinished, known)


def _keys(files: Files) -> np.ndarray:
    """64 bits of a hash for each file."""
    root = os.fsencode(os.path.abspath(files.root))
    parts = [b"%b\0%b\0%d\0%d" % (root, files.name(i), files.size(i), files.time(i)) for i in range(len(files))]
    digests = b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _without(split: Split, indices: list[int]) -> Split:
    return split[np.setdiff1d(np.arange(len(split)), indices)]


def _open(files: Files, workers: int, stopped: Callable[[], object]):
    if len(files) == 0:
        return
    workers = min(workers, -(-len(files) // AT_ONCE))
    loader = DataLoader(Opened(files), batch_size=AT_ONCE, collate_fn=list, **loader_options(workers))
    for results in patient(loader, f"{len(files)} files", stopped):
        yield from results


class Opened(Dataset):
    """What is wrong with each image, or None, and the flags of its key."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str | None, int]:
        path = self.files[index]
        try:
            with naming(str(path)), Image.open(path) as image:
                image.draft("RGB", (1, 1))  # a JPEG is read whole and not brought to pixels
                several, deep = getattr(image, "n_frames", 1) > 1, is_16_bit(image)
                rgb = to_rgb(image)
        except ValueError as error:
            return str(error), 0
        dark = deep and rgb.getextrema()[0][1] < 64
        return None, several * SEVERAL | deep * DEEP | dark * DARK
