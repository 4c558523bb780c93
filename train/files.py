"""Image files: one split of a data set, decoding, and batches of it on the device.

Images are either one uint8 tensor [N, C, H, W], which then lives on the device, or files, which worker processes decode.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import checkpoint
import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is odd in a file that is read all the same, a line for each of a million


class Files(Sequence):
    """Paths of files under ``root``, with their sizes and times of change, in one run of bytes.

    As Path objects a million of them would take 0.3 GB, and that in every worker process: reading an object writes its count of references
    and so copies its page.
    """

    def __init__(self, root: Path, names: Sequence[str], sizes: Sequence[int], times: Sequence[int]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.root, self.blob = root, b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self.sizes, self.times = (np.asarray(values, dtype=np.int64) for values in (sizes, times))  # bytes; nanoseconds
        self.order = np.arange(len(encoded))

    def __len__(self) -> int:
        return len(self.order)

    def name(self, index: int) -> bytes:
        """The path below ``root``."""
        at = self.order[index]
        return self.blob[self.ends[at] : self.ends[at + 1]]

    def size(self, index: int) -> int:
        return int(self.sizes[self.order[index]])

    def time(self, index: int) -> int:
        return int(self.times[self.order[index]])

    def __getitem__(self, index: int) -> Path:
        return self.root / os.fsdecode(self.name(index))

    def take(self, indices: np.ndarray) -> Files:
        taken = object.__new__(Files)
        taken.__dict__.update(self.__dict__, order=self.order[indices])
        return taken


@dataclass
class Split:
    images: Tensor | Files | list  # uint8 [N, C, H, W]; or files; or, until decoded, the bytes of image files
    labels: Tensor  # int64 [N], on the CPU

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> Split:
        if isinstance(self.images, Files):
            return Split(self.images.take(indices), self.labels[indices])
        images = self.images[indices] if isinstance(self.images, Tensor) else [self.images[i] for i in indices]
        return Split(images, self.labels[indices])

    @property
    def channels(self) -> int:
        return self.images.shape[1] if isinstance(self.images, Tensor) else 3


# ---- one image


def decode(source: Path | bytes, name: str) -> Image.Image:
    """Upright, in 8-bit RGB; ValueError with ``name`` where that cannot be."""
    with naming(name), Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        return to_rgb(image)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What a decoder raises becomes a ValueError that names the image."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a broken file can end in nearly any error of the decoder: SyntaxError, struct.error, KeyError, ...
        raise ValueError(f"{name} is not a readable image: {error}") from error


ORIENTATION, BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 0x0112, 258, 262, 284, 339  # tags of EXIF and TIFF
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 ... 8; an image whose EXIF is garbage is as upright as one that has none."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # struct.error, SyntaxError, ...: as with a broken image
        return 1
    return found if found in tuple(UPRIGHT) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says, each channel with its whole range on 0 ... 255.

    16 bits keep their upper 8, as Pillow does in colour; floats must lie in [0, 1]; what is transparent shows white. Integers of 32 bits
    and signed ones are refused, for nothing says what their black and white are.
    """
    image.load()
    tags, sixteen = getattr(image, "tag_v2", {}), is_16_bit(image)  # which a turned image has not
    bits = tags.get(BITS, (16,))
    if method := UPRIGHT.get(orientation(image)):
        image = image.transpose(Image.Transpose[method])
    if 2 in tags.get(SAMPLE_FORMAT, ()) and bits[0] < 32:
        raise ValueError("the range of its signed integers is unknown; save it in 8 or 16 bits, unsigned")
    if tags.get(PLANAR) == 2 and len(bits) > 1 and bits[0] != 8:
        raise ValueError(f"Pillow misreads colours of {bits[0]} bits that lie in planes; save it with the channels interleaved")
    if sixteen:
        gray = (np.asarray(image) >> (bits[0] - 8)).astype(np.uint8)
    elif image.mode == "I":
        raise ValueError("the range of its 32-bit integers is unknown; save it in 8 or 16 bits")
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"its floats must lie in [0, 1], got {pixels.min():g} to {pixels.max():g}")
        gray = np.rint(255 * pixels).astype(np.uint8)
    else:
        gray = None
    if gray is not None:
        return Image.fromarray(255 - gray if tags.get(PHOTOMETRIC) == 0 else gray).convert("RGB")  # 0: white is zero
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if image.getextrema()[3][0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))  # those are "I" in old Pillows


def decoded(split: Split) -> Split:
    """The bytes of image files as one tensor; other images as they are."""
    if isinstance(split.images, Tensor | Files) or isinstance(split.images[0], Path):
        return split
    pixels = np.stack([np.asarray(decode(image, f"image {i}")) for i, image in enumerate(split.images)])
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), split.labels)


# ---- batches

GAP = 2.0  # pixels for one of the result to which an image may be reduced in a quick way before it is resized as it should


class ImageFiles(Dataset):
    """Decoded and brought to size in a worker: a random resized crop to train with, or the middle of the image.

    The crop's randomness is a function of the key that comes with the index, so it depends neither on the workers nor on where a run
    was resumed.
    """

    def __init__(self, split: Split, size: int) -> None:
        self.paths, self.size = split.images, size

    def __getitem__(self, item: tuple[int, tuple[int, ...] | None]) -> Tensor | ValueError:
        index, key = item
        path = self.paths[index]
        try:
            with naming(str(path)), Image.open(path) as image:
                if not isinstance(image, JpegImageFile):
                    image.load()  # others may tell their orientation after the pixels, or turn them themselves
                size = width, height = image.size[::-1] if orientation(image) > 4 else image.size
                box = middle(*size) if key is None else random_resized_crop(*size, np.random.default_rng(key))
                fewer = min(box[2] - box[0], box[3] - box[1]) / (GAP * self.size)  # pixels decoded for one that is needed
                if fewer >= 2:
                    image.draft("RGB", tuple(math.ceil(side / fewer) for side in image.size))  # a JPEG is decoded at 1/2, 1/4 or 1/8
                rgb = to_rgb(image)
        except ValueError as error:  # raised by Batches: out of a worker it would come with the worker's traceback as its message
            return error
        x, y = rgb.width / width, rgb.height / height
        box = (box[0] * x, box[1] * y, min(box[2] * x, rgb.width), min(box[3] * y, rgb.height))
        small = rgb.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=GAP)
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


class KeyedRows:
    """A batch sampler for :class:`ImageFiles`: the given columns of the plan at hand, row by row, each index with the key of its crop."""

    plan: Tensor
    columns: list[int]
    first = 0
    key: tuple[int, ...] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...] | None]]]:
        for row in range(self.first, len(self.plan)):
            indices = self.plan[row].tolist()
            yield [(indices[n], None if self.key is None else (*self.key, row, n)) for n in self.columns]


PATIENCE = 300.0  # seconds without an image after which a worker counts as hung
POLL = 5.0  # seconds between two looks at whether the run was told to stop


def patient(loader: DataLoader, what: str, stopped: Callable[[], object]) -> Iterator:
    """The loader's batches; where none comes, an OSError that says what to change, or ``checkpoint.Stopped`` within ``POLL`` seconds."""
    batches, waited = begun(loader), 0.0
    while True:
        try:
            # Without workers images are read here; with them a wait is short, and is not broken off in the middle of what they send.
            with nullcontext() if loader.num_workers else checkpoint.interruptible(stopped):
                batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            if "timed out" not in str(error):
                raise ended(what, error) from error
            if stopped():
                raise checkpoint.Stopped from error
            waited += POLL
            if waited >= PATIENCE:
                raise OSError(f"no image came in {PATIENCE:.0f} s from {what}: a decoder or the file system hangs") from error
            continue
        waited = 0.0
        yield batch


def ended(what: str, error: RuntimeError) -> OSError:
    return OSError(f"a process that decodes {what} ended ({error}); where memory is short, fewer workers need less")


def begun(loader: DataLoader) -> Iterator:
    """Workers that stay from one iteration to the next are asked whether they are ready; those that do not say so in time are replaced."""
    try:
        return iter(loader)
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        loader._iterator = None
        return iter(loader)


def loader_options(workers: int) -> dict:
    options = {"num_workers": workers, "worker_init_fn": checkpoint.leave_process_group, "timeout": POLL if workers else 0}
    return options | {"generator": torch.Generator()}  # or the loader would draw from the generator that augments


def refuse_without_room(workers: int, size: int) -> None:
    """Workers hand batches over in shared memory. Where that is full they die, or torch waits for ever, and so it is asked for before."""
    shared = Path("/dev/shm")
    if workers == 0 or not shared.is_dir():
        return
    needed, stat = (2 * workers + 1) * size, os.statvfs(shared)  # two batches ahead for each worker, and the one in hand
    if needed > (free := stat.f_bavail * stat.f_frsize):
        raise OSError(
            f"{workers} workers need {needed / 2**20:.0f} MiB of shared memory, two batches each, {shared} has "
            f"{free / 2**20:.0f} MiB free: take fewer workers, smaller batches or images, or make it larger (docker run --shm-size)"
        )


class Batches:
    """uint8 images and labels on the device: one batch for each row of a plan of indices [batches, size]."""

    def __init__(
        self, split: Split, device: torch.device, image_size: int, workers: int, stopped: Callable[[], object] = lambda: False
    ) -> None:
        """``stopped`` is asked at each batch and while images are waited for; where it says yes, :class:`checkpoint.Stopped` is raised."""
        self.device, self.labels, self.stopped = device, split.labels.to(device), stopped
        self.resident = split.images.to(device) if isinstance(split.images, Tensor) else None
        if self.resident is None:
            self.rows = KeyedRows()
            options = loader_options(workers) | {"persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
            self.loader = DataLoader(ImageFiles(split, image_size), batch_sampler=self.rows, collate_fn=stack, **options)

    def __call__(
        self, plan: Tensor, first: int = 0, key: tuple[int, ...] | None = None, columns: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From row ``first`` on, of each the given columns. ``key`` seeds the crops of files; None takes the middle."""
        columns = torch.arange(plan.shape[1]) if columns is None else columns
        rows = plan[first:, columns].to(self.device)
        if self.resident is not None:
            for indices in rows:
                if self.stopped():
                    raise checkpoint.Stopped
                yield self.resident[indices], self.labels[indices]
            return
        self.rows.plan, self.rows.columns, self.rows.first, self.rows.key = plan, columns.tolist(), first, key
        files = self.loader.dataset
        refuse_without_room(self.loader.num_workers, len(columns) * 3 * files.size**2)
        for indices, images in zip(rows, patient(self.loader, f"{len(files.paths)} files", self.stopped), strict=True):
            if isinstance(images, ValueError):
                raise images
            if self.stopped():
                raise checkpoint.Stopped
            yield images.to(self.device, non_blocking=True), self.labels[indices]

    def end_workers(self) -> None:
        """Left to Python's collector, which may close their queues first, each is waited for until it looks for itself: 5 s."""
        if self.resident is None and (iterator := self.loader._iterator) is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def in_order(self, size: int, part: range | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, or every one of a part, for evaluation."""
        indices = torch.arange(len(self.labels)) if part is None else torch.arange(part.start, part.stop)
        whole = len(indices) // size * size
        if whole:  # or the workers would be begun and at once begun again, before they can answer
            yield from self(indices[:whole].view(-1, size))
        if whole < len(indices):
            yield from self(indices[None, whole:])
