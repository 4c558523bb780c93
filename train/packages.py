"""Packages that must be installed beside PyTorch: what is missing, too old or broken is said in a line, with what brings it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

# By the name of its import: the package, the least version that will do (None: any), and the extra in pyproject.toml that brings it.
PACKAGES: dict[str, tuple[str, str | None, str | None]] = {
    "fastsupcon": ("fastsupcon", None, "train"),
    "tyro": ("tyro", "0.9", "train"),
    "rich": ("rich", "14.1", "train"),
    "numpy": ("numpy", "1.26", "train"),
    "sklearn": ("scikit-learn", "1.4", "train"),
    "PIL": ("pillow", "10.1", "train"),  # before those that import it
    "matplotlib": ("matplotlib", "3.8", "train"),
    "pooch": ("pooch", "1.8", "train"),
    "tqdm": ("tqdm", "4.60", "train"),
    "joblib": ("joblib", "1.2", "train"),
    "timm": ("timm", "1.0", "train-extra"),
    "tensorboard": ("tensorboard", "2.15", "train-extra"),
    "safetensors": ("safetensors", "0.4", "train-extra"),
    "onnx": ("onnx", "1.17", "train-extra"),
    "onnxscript": ("onnxscript", "0.2", "train-extra"),
    "wandb": ("wandb", None, None),
    "mlflow": ("mlflow", None, None),
}


class Unusable(ValueError, ImportError):
    """A package that something needs, and that cannot be used."""


def need(name: str, what: str) -> ModuleType:
    """The package imported for ``what``, or an error that says why it cannot be, and what to do."""
    package, least, extra = PACKAGES[name]
    ways = ([f"pip install '.[{extra}]' in the checkout"] if extra else []) + ([f"pip install '{package}>={least}'"] if least else [])
    remedy = " or ".join(ways) or f"pip install {package}"
    try:
        module = import_module(name)
    except Exception as error:  # what a package that is broken, or does not fit another, raises as it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise Unusable(f"{what} needs {package}, which is not installed: {remedy}") from None
        told = " ".join(str(error).split())
        if "torchvision::" in told:
            remedy = f"the torchvision that is installed does not fit torch {version('torch')}; install the one that is made for it"
        raise Unusable(f"{what} needs {package}, which cannot be imported here ({type(error).__name__}: {told}): {remedy}") from error
    found = _version(module, package)
    if least and found and _numbers(found) < _numbers(least):
        raise Unusable(f"{what} needs {package} {least} or newer, and {found} is installed: {remedy}")
    return module


TRAINING = tuple(name for name, (_, _, extra) in PACKAGES.items() if extra == "train")


def start(script: str, names: Iterable[str] = TRAINING) -> None:
    """Before a script's other imports, which would end in a traceback: what it imports can be, or the process ends in a line.

    Help whose reader leaves early, as ``head`` does, ends without a word, and so does Ctrl-C during the imports and wherever a script does
    not heed it itself.
    """
    heeds = signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # which a shell sets for a job in the background
    if heeds:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))  # a package may make another error of an exception
    if hasattr(signal, "SIGPIPE") and not {"-h", "--help"}.isdisjoint(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        for name in names:
            need(name, script)
    except Unusable as error:
        raise SystemExit(f"error: {error}") from None
    if heeds:
        signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))


def _version(module: ModuleType, package: str) -> str | None:
    try:
        return getattr(module, "__version__", None) or version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
