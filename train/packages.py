"""Packages that must be installed beside PyTorch: what is missing, too old or broken is said in a line, with what brings it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
BASE, EXTRA = "requirements.txt", "requirements-extra.txt"  # beside this file
# By the name of its import: the package, the least version that will do (None: any), and the requirement file that brings it.
PACKAGES: dict[str, tuple[str, str | None, str | None]] = {
    "fastsupcon": ("fastsupcon", None, None),
    "tyro": ("tyro", "0.9", BASE),
    "rich": ("rich", "14.1", BASE),
    "numpy": ("numpy", "1.26", BASE),
    "sklearn": ("scikit-learn", "1.4", BASE),
    "PIL": ("pillow", "10.1", BASE),  # before those that import it
    "matplotlib": ("matplotlib", "3.8", BASE),
    "pooch": ("pooch", "1.8", BASE),
    "tqdm": ("tqdm", "4.60", BASE),
    "joblib": ("joblib", "1.2", BASE),
    "timm": ("timm", "1.0", EXTRA),
    "tensorboard": ("tensorboard", "2.15", EXTRA),
    "safetensors": ("safetensors", "0.4", EXTRA),
    "onnx": ("onnx", "1.17", EXTRA),
    "onnxscript": ("onnxscript", "0.2", EXTRA),
    "wandb": ("wandb", None, None),
    "mlflow": ("mlflow", None, None),
}


class Unusable(ValueError, ImportError):
    """A package that something needs, and that cannot be used."""


def need(name: str, what: str) -> ModuleType:
    """The package imported for ``what``, or an error that says why it cannot be, and what to do."""
    package, least, file = PACKAGES[name]
    remedy = f"pip install -r {_path(HERE / file)} or pip install '{package}>={least}'" if file else f"pip install {package}"
    if name == "fastsupcon":
        remedy = f"pip install {_path(HERE.parent)}"
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


TRAINING = ("fastsupcon", *(name for name, (_, _, file) in PACKAGES.items() if file == BASE))


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


def _path(path: Path) -> str:
    """As it is typed where the user is."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def _version(module: ModuleType, package: str) -> str | None:
    try:
        return getattr(module, "__version__", None) or version(package)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
