"""What lies in a folder of images, and what a list file names: splits, classes, files, and what was left out.

A folder is a split where its name is one of a split's usual spellings and its folders hold images; a class where it holds images, or
folders of images that are no splits. What could be read in two ways is refused.
"""

from __future__ import annotations

import codecs
import filecmp
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from files import Files, Split

SPELLINGS = {
    "train": {"train", "training", "trn"},
    "validation": {"val", "valid", "validate", "validation", "dev", "eval", "evaluation"},
    "test": {"test", "tests", "testing", "tst", "holdout", "heldout"},
}
JUNK = {
    "__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "recycler", "system volume information", "__pycache__",
    "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp",
}  # fmt: skip
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
    ".tif", ".tiff", ".tga", ".jp2", ".j2k", ".jpf", ".jpx", ".ico", ".avif", ".heic", ".heif", ".jxl",
}  # fmt: skip
COPY = re.compile(
    r"copy of (?P<first>.+)|(?P<last>.+?)(?: - copy| copy(?: \d+)?| \((?:another |\d+\w\w )?copy(?: \d+)?\))?(?: ?\(\d+\))?", re.IGNORECASE
)


def split_named(name: str, words: bool = False) -> str | None:
    """Which split a folder of this name holds: ``Training_Set`` holds train, ``valid`` validation.

    With ``words`` one word among others is enough: ``seg_train``, ``train 2``, ``ILSVRC2012_img_val``.
    """
    whole = re.sub(r"(?<=.)(set|data|images|imgs|split)$", "", re.sub(r"[\W_]+", "", name.lower()))
    said = {whole, *(re.findall(r"[a-z]+", name.lower()) if words else ())}
    found = [split for split, spelt in SPELLINGS.items() if spelt & said]
    return found[0] if len(found) == 1 else None


def is_junk(name: str) -> bool:
    """Hidden, or left by an operating system, a file server or an editor: .ipynb_checkpoints, ._cat.jpg, __MACOSX, @eaDir, Thumbs.db."""
    return name.startswith((".", "~$")) or name.lower() in JUNK


def copied(name: str) -> str | None:
    """What a file manager copied to this name: ``cat`` to ``cat (copy)``, ``cat - Copy``, ``Copy of cat``, ``cat copy 2``, ``cat (1)``."""
    if not name.endswith(")") and "copy" not in name.lower():
        return None
    found = COPY.fullmatch(name)
    original = found["first"] or found["last"]
    return original if original != name else None


@dataclass
class Left:
    """What was left out, to be said in the end."""

    junk: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    other: Counter = field(default_factory=Counter)  # suffixes of files that are no images

    def notes(self) -> list[str]:
        notes = []
        if self.junk:
            notes.append(f"ignored {len(self.junk)} hidden or left-over {entries(len(self.junk))}: {some(sorted(set(self.junk)))}")
        if self.copies:
            notes.append(f"ignored {len(self.copies)} {'copy' if len(self.copies) == 1 else 'copies'}: {some(self.copies)}")
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

    def sizes(self) -> set[tuple[str, int]]:
        return {(path, size) for path, size, _ in self.files()}


def look(path: Path, left: Left, above: frozenset[tuple[int, int]] = frozenset()) -> Folder:
    here = os.stat(path)
    if (here.st_dev, here.st_ino) in above:
        raise ValueError(f"{path} is a link to a folder that it lies in")
    above |= {(here.st_dev, here.st_ino)}
    folder, copies = Folder(path, {}, []), {}
    with os.scandir(path) as found:
        beside = {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}
    for name, entry in beside.items():
        if is_junk(name):
            left.junk.append(name)
        elif entry.is_dir():
            folder.folders[name] = look(path / name, left, above)
            if (original := copied(name)) in beside:
                copies[name] = original
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            status, (stem, suffix) = file_status(entry), os.path.splitext(name)
            original = beside.get(f"{copied(stem)}{suffix}")
            if original is not None and filecmp.cmp(entry, original, shallow=False):
                left.copies.append(name)
            else:
                folder.images.append((name, status.st_size, stamp(status)))
        elif entry.is_symlink() and not os.path.exists(entry):
            raise FileNotFoundError(f"{path / name} is a link to nothing")
        else:
            left.other[os.path.splitext(name)[1].lower()] += 1
    for name, original in copies.items():
        copy = folder.folders.pop(name)
        if others := copy.sizes() - folder.folders[original].sizes():
            raise ValueError(
                f"{path / name} is by its name a copy of {original}, and holds {min(others)[0]}, which that lacks: rename either"
            )
        left.copies.append(name)
    return folder


def file_status(path: os.PathLike | str) -> os.stat_result:
    """FileNotFoundError or another OSError where there is no file: a link to nothing, a folder, a pipe that would be waited for."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{os.fspath(path)} must be a file, got {'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe or a device'}")
    return status


def stamp(status: os.stat_result) -> int:
    """Another number where a file was written, or replaced by one of its time."""
    return status.st_mtime_ns ^ status.st_ctime_ns


@dataclass
class Found:
    classes: list[str]
    splits: dict[str, Split]  # train, and validation and test where there are such
    notes: list[str]


def read_folder(root: Path) -> Found:
    """root/train/CLASS/.../image, root/test and root/val likewise; or root/CLASS/.../image without splits."""
    left = Left()
    top, notes = unwrapped(look(root, left), split_named), []
    splits = find_splits(top)
    if "train" in splits:
        splits["train"] = train = unwrapped(splits["train"], lambda name: False)
        splits |= {name: unwrapped(folder, train.folders.__contains__) for name, folder in splits.items() if name != "train"}
    else:
        train = top
        refuse_splits_as_classes(top)
    classes = sorted(train.folders)
    if not classes:
        found = "; ".join([f"{len(train.images)} images and no folder", *left.notes()])
        raise ValueError(f"{train.path} must hold a folder for each class, got {found}")
    if train.images:
        raise ValueError(
            f"{train.path} must hold a folder for each class and no image beside them, got {some([name for name, *_ in train.images])}"
        )
    if top.path != root:
        notes.append(f"the data is in {top.path}")
    if splits:
        notes.append("splits: " + ", ".join(f"{split} is {folder.path.relative_to(top.path)}/" for split, folder in splits.items()))
        used = {folder.path.relative_to(top.path).parts[0] for folder in splits.values()}
        if aside := [*(name for name in top.folders if name not in used), *(name for name, *_ in top.images)]:
            notes.append(f"ignored beside the splits: {some(aside)}")
    if alike := [names for names in groups_alike(classes) if len(names) > 1]:
        notes.append(f"classes of nearly the same name: {some([' and '.join(map(ascii, names)) for names in alike])}")
    parts = {}
    for split, folder in (splits or {"train": top}).items():
        if unknown := [name for name, held in folder.folders.items() if name not in train.folders and held.count]:
            near = [f"{a!a} for {b!a}" for a in unknown for b in classes if plain(a) == plain(b)]
            hint = f" (perhaps {some(near)})" if near else ""
            raise ValueError(f"{folder.path} must hold the classes of {train.path}, got {some(unknown)}, which that lacks{hint}")
        if folder.images:
            raise ValueError(f"{folder.path} must hold a folder for each class and no image beside them, got {folder.images[0][0]}")
        if lacking := [name for name in classes if name not in folder.folders or not folder.folders[name].count]:
            notes.append(f"{split} has no image of {some(lacking)}")
        of_class = [folder.folders[name].files() if name in folder.folders else [] for name in classes]
        files = [(f"{name}/{path}", *stat) for name, found in zip(classes, of_class, strict=True) for path, *stat in found]
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(found) for found in of_class]))
        parts[split] = Split(Files(folder.path, *(zip(*files, strict=True) if files else ((), (), ()))), labels)
    return Found(classes, parts, notes + left.notes())


def unwrapped(folder: Folder, is_more: Callable[[str], object]) -> Folder:
    """What an archive that was unpacked into a folder of its name holds, however often: the only folder, where that is no more."""
    while not folder.flat and len(full := [f for f in folder.folders.values() if f.count]) == 1 and full[0].holds_classes:
        if is_more(full[0].path.name):
            break
        folder = full[0]
    return folder


def plain(name: str) -> str:
    """Without what two names may differ in and look the same: case, blanks at the ends, the Unicode form."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def groups_alike(names: list[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain(name), []).append(name)
    return list(groups.values())


def find_splits(top: Folder) -> dict[str, Folder]:
    """The folders that hold train, validation and test; none where all are classes."""
    named: dict[str, list[Folder]] = {}
    for name, folder in top.folders.items():
        if (split := split_named(name, words=folder.holds_classes)) and folder.count:
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


def refuse_splits_as_classes(top: Folder) -> None:
    """Splits below the classes, data sets side by side, and parts that each hold all the classes would be read as classes."""
    full = [folder for folder in top.folders.values() if folder.count]
    for folder in full:
        splits = [name for name, held in folder.folders.items() if held.count and split_named(name)]
        if len({split_named(name) for name in splits}) > 1:
            raise ValueError(
                f"{folder.path} holds {some(splits)} and is no class: expected {top.path}/train/CLASS/image, or that folder as root"
            )
    if len(full) > 1 and all(folder.holds_classes for folder in full):
        shared = set.intersection(*({name for name, held in folder.folders.items() if held.count} for folder in full))
        if len(shared) > 1:
            names = some([folder.path.name for folder in full])
            raise ValueError(
                f"{top.path} holds {names}, which all hold {some(sorted(shared))}: classes, or splits to be named train and test?"
            )


# ---- list files


MARKS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def lines_of(path: Path) -> list[str]:
    """Of a text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, as a Windows shell writes it."""
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
        raise FileNotFoundError(f"{path} must be a list file, got {'a folder or a device' if path.exists() else 'nothing there'}")
    names, labels, numbers = [], [], []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        name, _, label = re.sub(r"[ \t]+", " ", line.strip(" \t\0")[::-1], count=1)[::-1].rpartition(" ")
        if not name or not re.fullmatch("[0-9]{1,18}", label):
            raise ValueError(f"{path}, line {number}: expected 'relative/path label' with a label from 0, got {line[:200]!r}")
        names.append(name)
        labels.append(int(label))
        numbers.append(number)
    if not names:
        raise ValueError(f"{path} must name images, a line 'relative/path label' for each, got none")
    limit = len(labels) if classes is None else classes
    for number, name, label in zip(numbers, names, labels, strict=True):
        if label >= limit:
            what = "the training classes" if classes is not None else "as each class needs an image and the list holds no more"
            raise ValueError(f"{path}, line {number}: the label must lie in [0, {limit}), {what}, got {label} for {name}")
    if classes is None and (empty := sorted(set(range(max(labels) + 1)).difference(labels))):
        first = f": labels count from 0, the least is {min(labels)}" if empty[0] == 0 else ""
        found = f"got none for {len(empty)} of {max(labels) + 1} classes: {some(list(map(str, empty)))}{first}"
        raise ValueError(f"{path}: every class must have training images, {found}")
    sizes, times, bad = [], [], []
    for number, name in zip(numbers, names, strict=True):
        try:
            status = file_status(os.path.join(root, name))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            bad.append((number, name, error))
        else:
            sizes.append(status.st_size)
            times.append(stamp(status))
    if bad:
        number, name, error = bad[0]
        if type(error) is OSError and error.errno is None:  # it is there, and is no file
            raise OSError(f"{path}, line {number}: {error}")
        count = f"{len(bad)} of {len(names)} files that do not exist under {root}"
        raise FileNotFoundError(f"{path} names {count}, first on line {number}: {root / name}")
    return Split(Files(root, names, sizes, times), torch.tensor(labels, dtype=torch.int64))


def repeated(lists: dict[str, Split]) -> list[str]:
    """What should be said of files that are named more than once, in one split or in two."""
    seen: dict[str, dict[bytes, int]] = {}
    notes = []
    for split, found in lists.items():
        paths = [os.path.normpath(os.path.join(os.fsencode(found.images.root), found.images.name(i))) for i in range(len(found))]
        labels = found.labels.tolist()
        seen[split] = dict(zip(paths, labels, strict=True))
        if twice := len(paths) - len(seen[split]):
            other = len({path for path, label in zip(paths, labels, strict=True) if seen[split][path] != label})
            notes.append(f"{split}: {twice} lines name a file again" + (f", {other} files with another label" if other else ""))
    for split in list(lists)[1:]:
        if leaked := [path for path in seen[split] if path in seen["train"]]:
            notes.append(
                f"{len(leaked)} of {len(seen[split])} {split} images are training images: {some([os.fsdecode(p) for p in leaked], 3)}"
            )
    return notes
