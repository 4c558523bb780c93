"""What lies in a folder of images, and what a list file names: splits, classes, files, and what was left out.

A folder is a split where its name is one of a split's usual spellings and its folders hold images; a class where it holds images itself.
What could be read in two ways is refused.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from files import Files, Split

SPELLINGS = {
    "train": {"train", "training", "trn"},
    "validation": {"val", "valid", "validate", "validation", "dev", "eval", "evaluation"},
    "test": {"test", "testing", "tst"},
}
JUNK = {
    "__macosx", "@eadir", "thumbs", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information", "__pycache__",
}  # fmt: skip
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".tga", ".jp2",
    ".avif",
}  # fmt: skip


def split_named(name: str) -> str | None:
    """Which split a folder of this name holds: ``Training_Set`` holds train, ``valid`` validation."""
    word = re.sub(r"[\W_]+", "", name.lower())
    word = re.sub(r"(?<=.)(set|data|images|imgs|split)$", "", word)
    return next((split for split, words in SPELLINGS.items() if word in words), None)


def is_junk(name: str) -> bool:
    """Hidden, or left by an operating system, a file server or an editor: .ipynb_checkpoints, ._cat.jpg, __MACOSX, @eaDir, Thumbs.db."""
    return name.startswith((".", "~$")) or name.lower() in JUNK


@dataclass
class Left:
    """What was left out, to be said in the end."""

    junk: list[str] = field(default_factory=list)
    other: Counter = field(default_factory=Counter)  # suffixes of files that are no images

    def notes(self) -> list[str]:
        notes = []
        if self.junk:
            notes.append(f"ignored {len(self.junk)} hidden or left-over {entries(len(self.junk))}: {some(sorted(set(self.junk)))}")
        if self.other:
            kinds = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.other.most_common()]
            notes.append(f"ignored {sum(self.other.values())} files that are not images: {some(kinds)}")
        return notes


def entries(count: int) -> str:
    return "entry" if count == 1 else "entries"


def some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class Folder:
    """A folder with what lies directly in it, the images of all depths below it, each a path below it."""

    path: Path
    folders: dict[str, Folder]
    images: list[tuple[str, int, int]]  # path, size, time of change

    @property
    def flat(self) -> bool:
        return bool(self.images)

    @property
    def holds_classes(self) -> bool:
        return not self.flat and any(folder.count for folder in self.folders.values())

    @property
    def count(self) -> int:
        return len(self.images) + sum(folder.count for folder in self.folders.values())

    def files(self) -> list[tuple[str, int, int]]:
        below = [(f"{name}/{path}", *stat) for name, folder in self.folders.items() for path, *stat in folder.files()]
        return sorted(self.images + below)


def regular(path: str) -> os.stat_result:
    """What is no plain file is no image: whoever opened a pipe would wait for its writer."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} must be an image file, and is a folder, a pipe or a device")
    return found


def look(path: Path, left: Left, above: frozenset[tuple[int, int]] = frozenset()) -> Folder:
    here = os.stat(path)
    if (here.st_dev, here.st_ino) in above:
        raise ValueError(f"{path} is a link to a folder that it lies in")
    above |= {(here.st_dev, here.st_ino)}
    folder = Folder(path, {}, [])
    with os.scandir(path) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            if is_junk(entry.name):
                left.junk.append(entry.name)
            elif entry.is_dir():
                folder.folders[entry.name] = look(path / entry.name, left, above)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in IMAGE_SUFFIXES:
                file = regular(entry.path)  # a link to nothing ends here, with its name
                folder.images.append((entry.name, file.st_size, file.st_mtime_ns))
            else:
                left.other[suffix] += 1
    return folder


@dataclass
class Found:
    classes: list[str]
    splits: dict[str, Split]  # train, and validation and test where there are such
    notes: list[str]


def read_folder(root: Path) -> Found:
    """root/train/CLASS/.../image, root/test and root/val likewise; or root/CLASS/.../image without splits."""
    left = Left()
    top, notes = look(root, left), []
    while not top.flat and len(full := [f for f in top.folders.values() if f.count]) == 1 and full[0].holds_classes:
        if split_named(full[0].path.name):
            break
        top = full[0]  # an archive unpacked into a folder of its name
        notes.append(f"the data is in {top.path}")
    splits = find_splits(top)
    train = splits.get("train", top)
    classes = sorted(train.folders)
    if not classes:
        raise ValueError(f"{train.path} must hold a folder for each class, got {len(train.images)} images and no folder")
    if train.images:
        raise ValueError(
            f"{train.path} must hold a folder for each class and no image beside them, got {some([name for name, *_ in train.images])}"
        )
    if splits:
        notes.append("splits: " + ", ".join(f"{split} is {folder.path.name}/" for split, folder in splits.items()))
        if aside := [name for name, folder in top.folders.items() if folder not in splits.values()]:
            notes.append(f"ignored beside the splits: {some(aside)}")
    parts = {}
    for split, folder in (splits or {"train": top}).items():
        if unknown := [name for name, held in folder.folders.items() if name not in classes and held.count]:
            raise ValueError(f"{folder.path} must hold the classes of {train.path}, got {some(unknown)}, which that lacks")
        if folder.images:
            raise ValueError(f"{folder.path} must hold a folder for each class and no image beside them, got {folder.images[0][0]}")
        if lacking := [name for name in classes if name not in folder.folders or not folder.folders[name].count]:
            notes.append(f"{split} has no image of {some(lacking)}")
        of_class = [folder.folders[name].files() if name in folder.folders else [] for name in classes]
        files = [(f"{name}/{path}", *stat) for name, found in zip(classes, of_class, strict=True) for path, *stat in found]
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(found) for found in of_class]))
        parts[split] = Split(Files(folder.path, *(zip(*files, strict=True) if files else ((), (), ()))), labels)
    return Found(classes, parts, notes + left.notes())


def find_splits(top: Folder) -> dict[str, Folder]:
    """The folders that hold train, validation and test; none where all are classes."""
    named: dict[str, list[Folder]] = {}
    for name, folder in top.folders.items():
        if (split := split_named(name)) and folder.count:
            named.setdefault(split, []).append(folder)
    several = [folder for folders in named.values() for folder in folders]
    if not named:
        return {}
    if len(several) == 1 and several[0].flat and len(top.folders) > 1:
        return {}  # one class of several happens to be called so: the trains among cars and ships
    if twice := next((folders for folders in named.values() if len(folders) > 1), None):
        raise ValueError(f"{top.path} must hold each split once, got {' and '.join(folder.path.name for folder in twice)}")
    if "train" not in named:
        raise ValueError(f"{top.path} holds {some([folder.path.name for folder in several])} but no train folder")
    if flat := [folder.path.name for folder in several if folder.flat]:
        raise ValueError(f"{top.path}: a split must hold a folder for each class, got images directly in {some(flat)}")
    if len(named) == 1 and (others := [name for name, folder in top.folders.items() if folder.count and folder not in several]):
        raise ValueError(f"{top.path} holds {several[0].path.name} beside {some(others)}: a split, or a class like those?")
    return {split: named[split][0] for split in SPELLINGS if split in named}


# ---- list files


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def lines_of(path: Path) -> list[str]:
    """Of a text in UTF-8, or in UTF-16 with a byte order mark, as a Windows shell writes it."""
    raw = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: expected {encoding.upper()}, got the byte 0x{raw[error.start]:02x}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_list(path: Path, root: Path, classes: int | None = None) -> Split:
    """One ``relative/path label`` a line; the label is what follows the last blank or tab, so paths may hold spaces.

    Labels lie below ``classes``; where that is None, below the number of lines, for every class needs an image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a list file")
    names, labels, numbers = [], [], []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        name, _, label = re.sub(r"[ \t]+", " ", line.strip(" \t\0")[::-1], count=1)[::-1].rpartition(" ")
        if not name or not (label.isascii() and label.isdigit()):
            raise ValueError(f"{path}, line {number}: expected 'relative/path label' with a label from 0, got {line!r}")
        names.append(name)
        labels.append(int(label))
        numbers.append(number)
    limit = len(labels) if classes is None else classes
    for number, name, label in zip(numbers, names, labels, strict=True):
        if label >= limit:
            what = "the training classes" if classes is not None else "as each class needs an image and the list holds no more"
            raise ValueError(f"{path}, line {number}: the label must lie in [0, {limit}), {what}, got {label} for {name}")
    sizes, times, missing = [], [], []
    for number, name in zip(numbers, names, strict=True):
        try:
            found = os.stat(os.path.join(root, name))
        except (OSError, ValueError):  # ValueError: a name that no file can have
            missing.append((number, name))
        else:
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path}, line {number}: {root / name} must be an image file, and is a folder, a pipe or a device")
            sizes.append(found.st_size)
            times.append(found.st_mtime_ns)
    if missing:
        number, name = missing[0]
        count = f"{len(missing)} of {len(names)} files that do not exist under {root}"
        raise FileNotFoundError(f"{path} names {count}, first on line {number}: {root / name}")
    return Split(Files(root, names, sizes, times), torch.tensor(labels, dtype=torch.int64))
