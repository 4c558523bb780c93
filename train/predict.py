"""Predict with a trained network.

    python train/predict.py runs/X one.png folder 'photos/**/*.jpg'       # the three likeliest classes of each image
    python train/predict.py runs/X folder --top 1 --csv predictions.csv
    python train/predict.py runs/X --export onnx torch                    # write the network for other programs

Images are files, folders with all that is below them, and patterns. The exit status is 1 where an image could not be read, which stderr
names while the others are predicted, and 2 where nothing could be done.
"""

from __future__ import annotations

import packages

if __name__ == "__main__":
    packages.start("python train/predict.py", ("numpy", "PIL", "rich", "joblib"))

import argparse
import csv
import glob
import io
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
import exports
import torch
from folders import IMAGE_SUFFIXES, is_junk
from joblib import cpu_count
from terminal import printable, say_aside
from torch import Tensor
from trained import BATCH, Trained, load


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    try:
        paths = [path for one in given.images for path in files_of(one)]
        if given.export:
            for path in exports.export(load(given.run), given.export):  # on the CPU: a program computes where it was exported
                say_aside(f"written: {path}")
        if not paths:
            return 0
        device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model = load(given.run, weights=given.weights, device=device)
        model.check_takes_images()
        return show(model, paths, given.top, given.csv)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        say_aside(f"error: {error}")
        return 2


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("images", nargs="*", help="files, folders, or patterns in quotes")
    parser.add_argument("--top", type=int, default=3, help="classes shown for each image (3)")
    parser.add_argument("--csv", metavar="FILE", help="write a table instead; - is the standard output")
    parser.add_argument("--weights", help="another checkpoint of the run's folder, such as last.pt")
    parser.add_argument("--device", default="auto", help="cuda where there is one, else cpu (auto)")
    parser.add_argument("--export", nargs="+", default=[], choices=list(exports.FORMATS), help="write the network into the run's folder")
    given = parser.parse_args(arguments)
    if not given.images and not given.export:
        parser.error("images or --export must be given")
    if given.export and given.weights is not None:
        parser.error("--export writes the weights that the run reports, and takes no --weights")
    if given.csv is not None and not given.images:
        parser.error("--csv is a table of images, which must be given")
    if given.csv not in (None, "-") and (Path(given.csv).is_dir() or not Path(given.csv).parent.is_dir()):
        parser.error(f"--csv must be a file in a folder that exists, got {given.csv}")
    if given.top < 1:
        parser.error(f"--top must be positive, got {given.top}")
    return given


def files_of(given: str) -> list[Path]:
    """One file, the images below a folder, or what a pattern finds; a single file need not be there, and is then one that is unreadable."""
    path = Path(given)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        found = [p for p in found if not any(map(is_junk, p.relative_to(path).parts))]
    elif path.exists() or not glob.has_magic(given):
        return [path]
    else:
        found = sorted(p for p in map(Path, glob.glob(given, recursive=True)) if p.is_file())
    if not found:
        raise ValueError(f"{given} must be or find images, got none")
    return found


def predictions(model: Trained, paths: list[Path]) -> Iterator[tuple[Path, Tensor | ValueError]]:
    """Probabilities of each image, in order, or why it could not be read. Decoded by threads, a batch in memory at a time."""

    def prepared(path: Path) -> Tensor | ValueError:
        if path.exists() and not path.is_file():
            return ValueError(f"{path} must be a file, and to open a pipe would be to wait for its writer")
        try:
            return model.preprocess(path)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(8, cpu_count())) as pool:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            images = list(pool.map(prepared, part))
            readable = [image for image in images if isinstance(image, Tensor)]
            rows = iter(model(torch.stack(readable)).cpu() if readable else ())
            yield from ((path, next(rows) if isinstance(image, Tensor) else image) for path, image in zip(part, images, strict=True))


def show(model: Trained, paths: list[Path], top: int, table: str | None) -> int:
    top, unreadable = min(top, len(model.classes)), 0
    text = io.StringIO(newline="") if table not in (None, "-") else sys.stdout
    writer = csv.writer(text, lineterminator="\n")
    if table is not None:
        writer.writerow(["image", *(f"{what}_{place}" for place in range(1, top + 1) for what in ("class", "probability"))])
    for path, row in predictions(model, paths):
        if isinstance(row, ValueError):
            unreadable += 1
            say_aside(f"error: {row}")
            continue
        best = [(model.classes[c], p) for p, c in zip(*(x.tolist() for x in row.topk(top)), strict=True)]
        if table is None:
            print(printable(f"{path}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}"))
        else:
            writer.writerow([path, *(value for name, p in best for value in (name, f"{p:.6f}"))])
    if isinstance(text, io.StringIO):
        checkpoint.write_text(Path(table), text.getvalue())
    if unreadable:
        say_aside(f"{unreadable} of {len(paths)} images could not be read")
    return 1 if unreadable else 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough, as head has, ends it without a word
    sys.exit(main(sys.argv[1:]))
