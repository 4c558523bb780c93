"""The features of every image by a frozen network, computed once into a file, on which heads then train in seconds on a CPU.

    python train/features.py --data folder --root D --network vit_base_patch16_clip_224.openai --out F.npz
    python train/hybrid.py --data features --root F.npz --method hybrid-psc

Images are prepared as the network's weights want it: size, crop, interpolation, mean and std of timm's settings. Nothing is augmented.
The tail is cut here where --imbalance says so (a data set's default), or whole data are kept by --imbalance None, and hybrid.py cuts it:
the same images either way. A validation split of the data's own is kept; --validation is hybrid.py's.

Stopped in any way, the same command goes on: the features of each 1,024 images are written as they are ready, into OUT.parts.
"""

from __future__ import annotations

import packages

if __name__ == "__main__":
    packages.start("python train/features.py")

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import checkpoint
import data as datasets
import hybrid
import idle
import numpy as np
import settings
import torch
import tyro
from data import DATASETS, Data, Source, Split
from errors import TOLD, what_to_lower
from files import decode, loader_options, patient, refuse_without_room, stack, to_rgb
from idle import by
from networks import DTYPES, ON_FEATURES, check_pretrained, import_timm, is_timm, make_backbone, of_backbone, read_weights
from PIL import Image
from terminal import printable, progress_bar, say
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

PART = 1024  # images of a file of OUT.parts


@dataclass(frozen=True)
class Extraction:
    network: str  # a timm name, with the tag of its weights (vit_base_patch16_clip_224.openai), or a CIFAR ResNet
    out: Path  # F.npz
    images: tyro.conf.OmitArgPrefixes[Source] = field(default_factory=Source)
    weights: Path | None = None  # a file: timm's, or a run's last.pt or model.safetensors; None: timm's, from its hub
    width: int = 16  # channels of a CIFAR ResNet's first stage
    batch: int = 64
    dtype: Literal["float16", "float32"] = "float16"  # of the file
    device: str = "auto"  # cuda where there is one, else cpu
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network


# ---- the network and what it wants to see

Prepare = Callable[[Image.Image], Tensor]


def check_network(chosen: Extraction) -> None:
    """What is wrong with it is said before the images are read. Without weights it is refused: random features are worth nothing."""
    if chosen.network in ON_FEATURES:
        raise ValueError(f"network must be one for images, got {chosen.network!r}")
    if chosen.weights is None and not is_timm(chosen.network):
        raise ValueError(f"weights must be given for network {chosen.network!r}, for which there is no hub, got None")
    if is_timm(chosen.network):
        import_timm(chosen.network)
    elif DATASETS[chosen.images.data].shape is None:
        raise ValueError(f"network {chosen.network!r} takes images of 32 x 32 from memory, and data {chosen.images.data!r} are files")
    if chosen.weights is None:
        check_pretrained(chosen.network)
    elif not chosen.weights.is_file():
        raise FileNotFoundError(
            f"weights {chosen.weights} must be a file, got {'a folder' if chosen.weights.exists() else 'nothing there'}"
        )


def frozen(chosen: Extraction, channels: int) -> nn.Module:
    """The network with its weights."""
    network = make_backbone(chosen.network, channels, chosen.width, pretrained=chosen.weights is None)
    if chosen.weights is not None:
        network.load_state_dict(of_backbone(network, read_weights(chosen.weights), chosen.weights))
    return network.eval().requires_grad_(False)


def preparation(chosen: Extraction, network: nn.Module, images: Split) -> tuple[Prepare, dict[str, Any], tuple[int, ...]]:
    """From an image to what the network takes, how that is told, and its shape."""
    if is_timm(chosen.network):
        timm = import_timm(chosen.network)
        wanted = timm.data.resolve_model_data_config(network)
        return timm.data.create_transform(**wanted, is_training=False), wanted, tuple(wanted["input_size"])
    known = DATASETS[chosen.images.data]
    colours = {"mean": known.mean, "std": known.std}
    return partial(standardised, **colours), colours, tuple(images.images.shape[1:])


def standardised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Of the module's own, for workers that are spawned find it by its name."""
    pixels = torch.from_numpy(np.asarray(image).copy())
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return ((pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float() / 255 - mean) / std


class Prepared(Dataset):
    def __init__(self, split: Split, prepare: Prepare, *, colour: bool) -> None:
        self.images, self.prepare, self.colour = split.images, prepare, colour

    def __getitem__(self, index: int) -> Tensor | ValueError:
        if not isinstance(self.images, Tensor):
            try:
                return self.prepare(decode(self.images[index], str(self.images[index])))
            except ValueError as error:  # raised outside of the worker, whose traceback would else be its message
                return error
        pixels = self.images[index]
        image = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())
        return self.prepare(to_rgb(image) if self.colour else image)


# ---- parts on the disk


def digest(network: nn.Module) -> str:
    """Of all weights: what tells one network of a name from another."""
    whole = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        whole.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:12]


def begin(folder: Path, about: dict[str, Any]) -> None:
    """The folder of parts, new or of the same extraction."""
    told = folder / "about.json"
    if not told.exists():
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(told, about)
        return
    try:
        stored = json.loads(told.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{told} is not readable JSON ({error}): delete the folder to begin anew") from error
    now = json.loads(json.dumps(about))
    if changed := [name for name in now if stored.get(name) != now[name]]:
        raise ValueError(f"{folder} holds parts of another extraction, whose {', '.join(changed)} differ: delete it, or name another out")


def missing_parts(folder: Path, name: str, images: int) -> list[range]:
    parts = [range(start, min(start + PART, images)) for start in range(0, images, PART)]
    return [part for part in parts if not part_file(folder, name, part).exists()]


def part_file(folder: Path, name: str, part: range) -> Path:
    return folder / f"{name}-{part.start:09d}.npy"


@torch.inference_mode()
def compute(network: nn.Module, loader: DataLoader, chosen: Extraction, device: torch.device, stopped: Callable[[], object]) -> Iterator:
    """The features of each batch, on the CPU in the file's type."""
    dtype = getattr(torch, chosen.dtype)
    for images in patient(loader, "the images", stopped):
        if isinstance(images, ValueError):
            raise images
        with torch.autocast(device.type, DTYPES[chosen.precision], enabled=chosen.precision != "fp32"):
            features = network(images.to(device, non_blocking=True))
        features = features.to(dtype)
        if not features.isfinite().all():
            raise ValueError(f"dtype {chosen.dtype} must hold the features, and some are not finite: expected a network's and float32")
        yield features.cpu()


@what_to_lower("lower --batch, or take --precision bf16")
def extract(chosen: Extraction, data: Data, network: nn.Module) -> None:
    """Compute what parts are missing, then join them."""
    device = torch.device(settings.usable_device(chosen.device))
    folder = chosen.out.with_name(chosen.out.name + ".parts")
    prepare, wanted, shape = preparation(chosen, network, data.train)
    about = {"network": chosen.network, "weights": digest(network), "preparation": wanted, "dtype": chosen.dtype}
    about |= {"precision": chosen.precision, "data": chosen.images.data, "split": data.split_hash, "fingerprint": data.fingerprint}
    begin(folder, about)
    network = network.to(device)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {name: split for name, split in splits.items() if split is not None}
    refuse_without_room(chosen.images.workers, 4 * chosen.batch * int(np.prod(shape)))
    with checkpoint.StopSignal() as stop, progress_bar() as progress:
        missing = {name: missing_parts(folder, name, len(split)) for name, split in splits.items()}
        total, left = sum(map(len, splits.values())), sum(len(part) for parts in missing.values() for part in parts)
        task = progress.add_task(chosen.out.name, total=total, completed=total - left, text="")
        for name, parts in missing.items():
            batches = [list(part)[at : at + chosen.batch] for part in parts for at in range(0, len(part), chosen.batch)]
            options = {"batch_sampler": batches, "collate_fn": stack, "pin_memory": device.type == "cuda"}
            if not batches:
                continue
            prepared = Prepared(splits[name], prepare, colour=is_timm(chosen.network))
            loader = DataLoader(prepared, **options, **loader_options(chosen.images.workers))
            try:
                ready = compute(network, loader, chosen, device, lambda: stop.received)
                for part in parts:
                    rows: list[Tensor] = []
                    while sum(map(len, rows)) < len(part):
                        rows.append(next(ready))
                        progress.advance(task, len(rows[-1]))
                        if stop.received:
                            raise checkpoint.Stopped
                    whole = torch.cat(rows).numpy()
                    checkpoint.write_whole(part_file(folder, name, part), lambda file, whole=whole: np.save(file, whole))
            except checkpoint.Stopped:
                progress.stop()
                say(f"stopped; the same command goes on from {folder}")
                sys.exit(128 + stop.received)
    arrays: dict[str, np.ndarray] = {"classes": np.array(data.classes), "kept": data.kept}
    for name, split in splits.items():
        arrays[name] = joined(folder, name, len(split))
        arrays[f"{name}_labels"] = split.labels.numpy()
    about |= {"packages": checkpoint.environment(device)["packages"]}
    checkpoint.write_whole(chosen.out, lambda file: np.savez(file, about=np.array(json.dumps(about)), **arrays))
    shutil.rmtree(folder)


def joined(folder: Path, name: str, images: int) -> np.ndarray:
    found = []
    for start in range(0, images, PART):
        part = range(start, min(start + PART, images))
        file = part_file(folder, name, part)
        try:
            rows = np.load(file)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file} must be a whole .npy file ({error}): delete it, and the same command computes it again") from error
        if len(rows) != len(part):
            raise ValueError(f"{file} must hold {len(part)} rows, got {len(rows)}: delete it, and the same command computes it again")
        found.append(rows)
    return np.concatenate(found)


# ---- the command line

ACTS = (by("width", "a CIFAR ResNet", "network", lambda name: not is_timm(name)), *settings.OF_SOURCE)


def parse(arguments: list[str]) -> Extraction:
    """The data set is read first, so that the defaults that are shown are its own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", nargs="?", default=Source.data)
    first.add_argument("--root", nargs="?", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    images = datasets.defaults(chosen.data)
    if chosen.root is not None:
        datasets.check_root(chosen.data, chosen.root)  # before what else is missing would hide it
    return tyro.cli(Extraction, default=Extraction(tyro.MISSING, tyro.MISSING, images), args=arguments, description=__doc__)


def checked(chosen: Extraction) -> None:
    if chosen.out.suffix != ".npz":
        raise ValueError(f"out must end in .npz, got {chosen.out}")
    if chosen.out.exists():
        raise ValueError(f"out {chosen.out} exists already: delete it, or name another file")
    if not chosen.out.parent.is_dir():
        raise FileNotFoundError(f"out {chosen.out} must lie in a folder that exists, got {chosen.out.parent}")
    if chosen.images.data == "features":
        raise ValueError("data must be images, got 'features'")
    known = datasets.defaults(chosen.images.data)
    for name in ("validation", "many", "few", "image_size"):
        whose = "the network's own" if name == "image_size" else "hybrid.py's"
        if (value := getattr(chosen.images, name)) != getattr(known, name):
            raise ValueError(f"{name} is {whose} here: expected {getattr(known, name)}, got {value}")
    base = Extraction(chosen.network, chosen.out, known)
    values, before = ({**vars(one), **vars(one.images)} for one in (chosen, base))
    settings.check_ranges(values)
    idle.refuse(ACTS, [name for name in vars(base.images) | vars(base) if values[name] != before[name]], [values])
    settings.usable_device(chosen.device)
    check_network(chosen)


def main(arguments: list[str]) -> None:
    try:
        chosen = parse(arguments)
        checked(chosen)
        data = hybrid.checked_data(chosen.images)
        network = frozen(chosen, 3 if is_timm(chosen.network) else data.train.channels)
        extract(chosen, data, network)
    except TOLD as error:
        sys.exit(f"error: {printable(str(error))}")
    say(f"written to {chosen.out}: python train/hybrid.py --data features --root {chosen.out} --method hybrid-psc")


if __name__ == "__main__":
    main(sys.argv[1:])
