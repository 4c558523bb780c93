"""The command line of hybrid.py: settings with the defaults of a recipe, or of a run that there is."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import settings
import tyro
from data import check_root
from settings import Config


@dataclass(frozen=True)
class Command:
    """What to do, beside the settings of a run."""

    config: Path | None = None  # the settings that a config.json holds, instead of a recipe's
    augment_as: str | None = None  # augmentation of the classifier's images: none, digits, cifar, cifar-plain, autoaugment, sim or files
    feature_augment_as: str | None = None  # and of the feature branch's views, by the same names
    paper: bool = False  # the optimiser and the augmentation of the method's paper, instead of the data set's recipe
    resume: Path | None = None  # go on with the run in this folder, whose settings hold; --epochs may extend it
    eval_only: Path | None = None  # evaluate the run in this folder again


@dataclass(frozen=True)
class Given(Config):
    command: tyro.conf.OmitArgPrefixes[Command] = Command()


def parse(arguments: list[str], description: str | None = None) -> tuple[Config, Command]:
    """The recipe is chosen first, so that the defaults that are shown and changed are real."""
    for option, value in pairwise(["", *arguments]):
        if not value or re.fullmatch("--[^=]+=", value):
            raise ValueError(f"no argument may be empty, got {value or f'{option} and nothing'!r}: a variable that is not set?")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("data", "method", "config", "resume", "eval-only", "network", "weights", "root"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?")  # the second parser complains of one without its value
    for name in settings.AUGMENTS:
        first.add_argument(f"--{name.replace('_', '-')}-as", f"--{name}_as")
    for name in ("paper", "pretrained"):
        first.add_argument(f"--{name}", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    asks_for_help = "-h" in arguments or "--help" in arguments
    stored = {name: path for name in ("config", "resume", "eval_only") if (path := getattr(chosen, name))}
    if len(stored) > 1:
        raise ValueError(f"one of --config, --resume and --eval-only is expected, got {' and '.join(stored)}")
    if stored:
        path = Path(*stored.values())
        if not chosen.config and path.is_file():
            raise ValueError(f"--resume and --eval-only take the folder of a run, got the file {path}")
        base = settings.read(path)
        if (
            chosen.paper
            or (chosen.data or base.images.data) != base.images.data
            or (chosen.method or base.method.method) != base.method.method
        ):
            raise ValueError(f"--data, --method and --paper choose a recipe, which {path} takes the place of: expected none of them")
        if chosen.config:
            base = settings.change(base, out=None)  # or it would be the old run's
    else:
        if chosen.root is not None or not asks_for_help:
            check_root(chosen.data or "digits", chosen.root and Path(chosen.root))  # before what a package that is missing would hide it
        network = settings.trained_network(chosen.network, chosen.pretrained, chosen.weights)
        base = settings.recipe(chosen.data or "digits", chosen.method or "hybrid-sc", paper=chosen.paper, network=network)
        if not processes.launched() and len(arguments) == asks_for_help:  # torchrun's processes share one run
            base = settings.change(base, **DEMONSTRATION)
    named = {group: name for group in settings.AUGMENTS if (name := getattr(chosen, f"{group}_as"))}
    if named and stored:
        raise ValueError(f"--augment-as and --feature-augment-as choose recipes, which {path} takes the place of: expected none of them")
    shown = base
    for group, name in named.items():
        shown = settings.augmented_as(shown, group, name)
    parts = {name: getattr(shown, name) for name in settings.GROUPS}
    given = tyro.cli(Given, default=Given(**parts), args=arguments, description=description)
    config = Config(**{name: getattr(given, name) for name in settings.GROUPS})
    settings.refuse_idle(config, base, {name: value or None for name, value in vars(given.command).items()})
    if chosen.resume or chosen.eval_only:
        allowed = {"epochs"} if chosen.resume else set()
        if changed := set(settings.differing(base, config)) - allowed:
            raise ValueError(f"--resume and --eval-only take the run's own settings, got also: {', '.join(sorted(changed))}")
        if config.optimiser.epochs < base.optimiser.epochs:
            raise ValueError(f"epochs may extend a run of {base.optimiser.epochs}, got {config.optimiser.epochs}")
        if settings.of_several(config) != settings.of_several(base):
            held = "several runs" if settings.of_several(base) else "one run"
            raise ValueError(f"{path} holds {held}, which --seeds and --against cannot change")
        config = settings.change(config, out=path)
    return config, given.command


#: What the command without any argument adds.
DEMONSTRATION: dict[str, Any] = {
    "seeds": 3,
    "data_seeds": True,
    "against": ("ce", "logit-adjustment", "ours"),
    "jobs": 2,
}
