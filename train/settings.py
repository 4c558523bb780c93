"""What a run is told: its settings in groups, the recipe of a data set and a method, and config.json."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import checkpoint
import exports
import processes
import torch
import tyro
from augment import AUGMENTATIONS, Augmentation
from data import DATASETS, Source, defaults
from methods import CLASSIFIER_LOSSES, FEATURE_LOSSES, METHODS, Method, passes
from networks import DTYPES, ON_FEATURES, is_timm, make_backbone, timm_settings
from schedule import SCHEDULES, switch_epoch

from fastsupcon.backends import select as select_backend


@dataclass(frozen=True)
class Network:
    network: str = "resnet32"  # a CIFAR ResNet (resnet8 ... resnet110), a timm name, or "mlp" or "none" for data that are features already
    width: int = 16  # channels of a CIFAR ResNet's first stage; of mlp's hidden layer
    hidden: int = 64  # of the projection head
    embedding: int = 128  # its output
    pretrained: bool = False  # timm's weights for the backbone, from its hub
    weights: Path | None = None  # from which the network begins: a run's last.pt or model.safetensors, or a file of timm's for the backbone
    dropout: float = 0.0  # of features, where the data are features: what makes two views of an image differ


@dataclass(frozen=True)
class Optimiser:
    epochs: int = 200  # an epoch is one pass of the feature branch, of the classifier branch where there is no other
    batch: int = 512  # images of the feature branch, each in as many views as its loss has; of all processes together
    classifier_batch: int | None = None  # None: as many as batch
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.5  # at its peak
    warmup: float = 0.0  # fraction of the steps
    milestones: tuple[float, ...] = (0.6, 0.8)  # fractions of the steps at which lr drops; none: cosine
    lr_factor: float = 0.1  # by which it drops at each
    momentum: float = 0.9  # of sgd; adamw's first beta
    nesterov: bool = False  # of sgd
    weight_decay: float = 1e-4
    clip: float | None = None  # largest norm of the gradient
    ema: float | None = None  # decay of a running average of the weights, which is then what is evaluated


@dataclass(frozen=True)
class Machine:
    device: str = "auto"  # cuda where there is one, else cpu
    backend: str = "auto"  # fastsupcon's: auto, cuda, triton, cpu, chunked, reference
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # the network, by torch.compile
    channels_last: bool = True  # memory layout of images and convolutions
    threads: int | None = None  # None: torch's choice


@dataclass(frozen=True)
class Records:
    seed: int = 0  # of weights, samplers and augmentation
    seeds: int = 1  # train this many, seed, seed + 1, ..., and report mean and spread
    data_seeds: bool = False  # each seed cuts its own tail too: data_seed is the seed
    jobs: int = 1  # of several seeds and methods, how many are trained at the same time, each in a process of its own
    against: tuple[str, ...] = ()  # other methods that are trained beside this one, at equal images, and compared with it seed by seed
    out: Path | None = None  # the run's folder; None: runs/DATA-METHOD-DATE
    eval_every: int | None = None  # epochs; None: ten times in all
    eval_batch: int | None = None  # images of a batch in evaluation; None: as many as a training step takes, which fit
    log_every: int = 50  # steps between two readings of the loss inside an epoch
    keep_every: int | None = None  # epochs between checkpoints that are kept; None: the last one alone
    knn: bool = False  # also classify by the nearest training images
    pictures: bool = True  # per class, confusion, embedding, curves
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # beside log.jsonl
    export: tuple[Literal["safetensors", "torch", "onnx"], ...] = ()  # the chosen network, for other programs


@dataclass(frozen=True)
class Config:
    images: tyro.conf.OmitArgPrefixes[Source] = field(default_factory=Source)
    method: tyro.conf.OmitArgPrefixes[Method] = field(default_factory=Method)
    network: tyro.conf.OmitArgPrefixes[Network] = field(default_factory=Network)
    optimiser: tyro.conf.OmitArgPrefixes[Optimiser] = field(default_factory=Optimiser)
    augment: Augmentation = field(default_factory=Augmentation)  # of the classifier's images
    feature_augment: Augmentation = field(default_factory=Augmentation)  # of the feature branch's views
    machine: tyro.conf.OmitArgPrefixes[Machine] = field(default_factory=Machine)
    records: tyro.conf.OmitArgPrefixes[Records] = field(default_factory=Records)


GROUPS = tuple(f.name for f in dataclasses.fields(Config))
AUGMENTS = ("augment", "feature_augment")
# The run is the same whatever these are.
FREE = {
    "root", "workers", "check", "device", "threads", "eval_batch", "log_every", "keep_every", "knn", "pictures", "log_to", "export", "out",
    "seeds", "against", "jobs",
}  # fmt: skip


# ---- recipes


def recipe(data: str, method: str, *, paper: bool = False, network: str | None = None) -> Config:
    """What is known to work: a data set's settings with a method's, or with ``paper`` the optimiser and pictures of the method's paper.

    ``network`` is a timm network that begins from trained weights: images have the size, mean and std that these are used to.
    """
    images, entry = named(DATASETS, "data", data), named(METHODS, "method", method)
    if paper and not entry.paper:
        raise ValueError(f"paper must be False for method {method!r}, whose settings are the data set's recipe, got True")
    settings = dict(images.recipe) | (entry.paper if paper else {})
    if data == "digits":  # as many images as 160 epochs of a classifier alone, whatever the method takes of each batch
        settings |= {"epochs": round(160 / passes(entry.method))}
    config = Config(images=defaults(data), method=method_of(data, method))
    colours = {"mean": images.mean, "std": images.std}
    if network is not None:
        wanted = timm_settings(network)
        colours = {"mean": tuple(wanted.mean), "std": tuple(wanted.std)}
        if images.shape is None:
            settings |= {"image_size": wanted.input_size[-1]}
    augments = {name: dataclasses.replace(AUGMENTATIONS[settings.pop(name, images.augment)], **colours) for name in AUGMENTS}
    return change(dataclasses.replace(config, **augments), **settings)


def method_of(data: str, name: str) -> Method:
    """A row of METHODS, with the temperature that the data set's recipe has for prototypes."""
    method = dataclasses.replace(named(METHODS, "method", name).method, method=name)
    return dataclasses.replace(method, temperature=DATASETS[data].psc_temperature) if method.feature_loss in ("psc", "mpsc") else method


def named(table: dict[str, Any], argument: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def augmented_as(config: Config, group: str, name: str) -> Config:
    """With another recipe of augmentation in one branch, for the same colours."""
    old, new = getattr(config, group), named(AUGMENTATIONS, group, name)
    return dataclasses.replace(config, **{group: dataclasses.replace(new, mean=old.mean, std=old.std)})


def settings_of(config: Config) -> Iterator[tuple[str, str, Any]]:
    """Group, name and value of each."""
    for group in GROUPS:
        for one in dataclasses.fields(part := getattr(config, group)):
            yield group, one.name, getattr(part, one.name)


def change(config: Config, **settings: Any) -> Config:
    """The config with some settings replaced, by their names alone; one of augmentation is replaced for both branches."""
    for group in GROUPS:
        part = getattr(config, group)
        own = {f.name: settings[f.name] for f in dataclasses.fields(part) if f.name in settings}
        config = dataclasses.replace(config, **{group: dataclasses.replace(part, **own)})
    if unknown := set(settings) - {name for _, name, _ in settings_of(config)}:
        raise ValueError(f"no such setting: {', '.join(sorted(unknown))}")
    return config


def configure(data: str = "digits", method: str = "hybrid-sc", *, paper: bool = False, **settings: Any) -> Config:
    """A recipe, changed and checked: what the command line does, for Python."""
    return checked(change(recipe(data, method, paper=paper, network=trained_network(**settings)), **settings))


def trained_network(network: str | None = None, pretrained: bool = False, weights: Path | None = None, **_: Any) -> str | None:
    """Of these settings, the timm network that begins from trained weights."""
    return network if network is not None and is_timm(network) and (pretrained or weights is not None) else None


def of_several(config: Config) -> bool:
    """Whether its folder holds folders of runs, and is not a run's itself."""
    return config.records.seeds > 1 or len(config.records.against) > 0


def differing(a: Config, b: Config) -> list[str]:
    """Names of the settings in which two runs are not the same run."""
    pairs = zip(settings_of(a), settings_of(b), strict=True)
    return [f"{group}.{name}" if group in AUGMENTS else name for (group, name, x), (_, _, y) in pairs if x != y and name not in FREE]


# ---- what can be wrong with them


def checked(config: Config) -> Config:
    """Everything checked that can be without the data; the device named."""
    named(DATASETS, "data", config.images.data)
    _check_choices(config)
    values = {name: value for group, name, value in settings_of(config) if group not in AUGMENTS}
    positive = ("epochs", "batch", "classifier_batch", "lr", "temperature", "width", "hidden", "embedding", "seeds", "jobs", "eval_every")
    positive += ("eval_batch", "log_every", "keep_every", "prototypes_per_class", "positives", "image_size", "clip", "threads", "lr_factor")
    for name in positive:
        if values[name] is not None and not 0 < values[name] < math.inf:
            raise ValueError(f"{name} must be positive, got {values[name]}")
    for name in ("weight_decay", "workers", "logit_adjustment", "focal_gamma", "margin", "cosine", "tau_normalisation", "mixup"):
        if not values[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {values[name]}")
    for name in ("warmup", "switch_at", "momentum", "validation", "class_weights", "reweight_from", "dropout"):
        if not 0 <= values[name] < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {values[name]}")
    if not all(0 < milestone < 1 for milestone in config.optimiser.milestones):
        raise ValueError(f"milestones must lie in (0, 1), got {config.optimiser.milestones}")
    if not config.optimiser.milestones and config.optimiser.lr_factor != Optimiser.lr_factor:
        raise ValueError(f"lr_factor acts at milestones, and there are none: got {config.optimiser.lr_factor}")
    for name in ("ema", "momentum_encoder"):
        if values[name] is not None and not 0 < values[name] < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {values[name]}")
    _check_method(config)
    chosen = config.machine.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = processes.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {chosen!r} is not usable here: {error}") from error
    exports.check(config.records.export)
    for package in config.records.log_to:
        if find_spec(package) is None:
            raise ValueError(f"log_to needs the package {package}, which is not installed: pip install {package}")
    _check_network(config)
    if config.method.feature_loss != "none":  # raises where this backend cannot serve
        select_backend(config.machine.backend, device, DTYPES[config.machine.precision], config.network.embedding)
    return change(config, device=chosen)


def _check_choices(config: Config) -> None:
    """Python may give what the command line would refuse. A data set may be one that was added to the table, where the recipe looks."""
    for group in GROUPS:
        for name, hint in typing.get_type_hints(type(getattr(config, group))).items():
            value = getattr(getattr(config, group), name)
            if name == "data":
                continue
            several = typing.get_origin(hint) is tuple
            choice = typing.get_args(hint)[0] if several else hint
            for one in value if several else (value,):
                if typing.get_origin(choice) is Literal and one not in typing.get_args(choice):
                    raise ValueError(f"{name} must be {'some' if several else 'one'} of {', '.join(typing.get_args(choice))}, got {one!r}")


def _check_network(config: Config) -> None:
    """Raises where there is no such network, or no such use of it."""
    network, given, views = config.network, config.images.data, FEATURE_LOSSES[config.method.feature_loss]
    with torch.device("meta"):
        make_backbone(network.network, 3, network.width)
    known, on_features = DATASETS[given], network.network in ON_FEATURES
    if known.shape == () and not on_features:
        raise ValueError(f"network must be {' or '.join(ON_FEATURES)} for data {given!r}, which are features, got {network.network!r}")
    if on_features and known.shape != ():
        raise ValueError(f"network {network.network!r} takes features, and data {given!r} is images")
    if network.dropout and not on_features:
        raise ValueError(f"dropout acts on data that are features, got {network.dropout} and data {given!r}")
    if not on_features:
        return
    if network.network == "none" and views.views and not views.trains_classifier:
        raise ValueError(
            f"feature_loss {config.method.feature_loss!r} would have no influence on the classifier where network is 'none': expected "
            "'mlp', whose hidden layer both train"
        )
    if network.weights is not None or network.pretrained:
        raise ValueError(
            f"weights are of a network for images, and data are features, got weights {network.weights}, pretrained {network.pretrained}"
        )
    if views.views + views.keys > 1 and not network.dropout:
        raise ValueError(
            f"feature_loss {config.method.feature_loss!r} compares views of an image, and those of features are equal: expected dropout "
            "above 0, which makes them differ, or a loss of one view (psc, mpsc), got dropout 0"
        )
    idle = Augmentation(mean=known.mean, std=known.std)
    for group in AUGMENTS:
        names = (one.name for one in dataclasses.fields(idle))
        if changed := [name for name in names if getattr(getattr(config, group), name) != getattr(idle, name)]:
            raise ValueError(f"{group} acts on images, and data {given!r} is features: expected no {', '.join(changed)}")


# Settings of a method that act beside some choices alone: the setting that is chosen, and the choices that read them.
READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "temperature": ("feature_loss", ()),  # (): any but "none"
    "loss_weights": ("feature_loss", ()),
    "classifier_images": ("classifier_loss", ()),
    "class_weights": ("classifier_loss", ()),
    "mixup": ("classifier_loss", ()),
    "prototypes_per_class": ("feature_loss", ("mpsc",)),
    "denominator": ("feature_loss", ("psc", "mpsc")),
    "positives": ("feature_loss", ("kcl",)),
    "momentum_encoder": ("feature_loss", ("paco",)),
    "queue": ("feature_loss", ("paco", "gpaco")),
    "positive_weight": ("feature_loss", ("paco", "gpaco")),
    "focal_gamma": ("classifier_loss", ("focal",)),
    "margin": ("classifier_loss", ("ldam",)),
    "logit_adjustment": ("classifier_loss", ("ce",)),
    "switch_at": ("schedule", ("switch", "two-stage")),
}


def _check_method(config: Config) -> None:
    method, rest = config.method, Method()
    named(METHODS, "method", method.method)
    named(FEATURE_LOSSES, "feature_loss", method.feature_loss)
    named(CLASSIFIER_LOSSES, "classifier_loss", method.classifier_loss)
    named(SCHEDULES, "schedule", method.schedule)
    for name, (loss, readers) in READ_BY.items():
        chosen = getattr(method, loss)
        if getattr(method, name) != getattr(rest, name) and (chosen not in readers if readers else chosen == "none"):
            raise ValueError(
                f"{name} acts on {f'{loss} ' + ' and '.join(readers) if readers else f'a {loss}'} alone, got {loss} {chosen!r}"
            )
    if method.feature_loss == "none" and method.schedule != "two-stage" and method.feature_sampler != rest.feature_sampler:
        raise ValueError(f"feature_sampler acts on a feature_loss or the first of two stages, got {method.feature_sampler!r} and neither")
    parametric = method.feature_loss in ("paco", "gpaco")  # whose logits of the classifier are in their loss
    if method.classifier_loss == "none" and not parametric:
        raise ValueError(
            f"classifier_loss 'none' needs a feature loss that trains the classifier (paco, gpaco), got {method.feature_loss!r}"
        )
    if method.classifier_loss == "none" and method.sampler != rest.sampler:
        raise ValueError(f"sampler acts on a classifier_loss alone, got {method.sampler!r} and classifier_loss 'none'")
    if method.classifier_loss == "none" and method.schedule == "two-stage":
        raise ValueError("schedule 'two-stage' needs a classifier_loss for its second stage, got 'none'")
    if parametric and method.cosine:
        raise ValueError(f"feature_loss {method.feature_loss!r} needs a linear classifier: expected cosine 0, got {method.cosine}")
    if method.feature_loss == "none" and method.schedule not in ("sum", "two-stage"):
        raise ValueError(f"schedule must be 'sum' or 'two-stage' without a feature loss, got {method.schedule!r}")
    if method.mixup and method.classifier_images == "views":
        raise ValueError("mixup mixes the classifier's own images: expected classifier_images 'own' or 'shared', got 'views'")
    if method.classifier_loss == "ldam" and not method.cosine:
        raise ValueError("classifier_loss 'ldam' needs a cosine classifier, whose scale is its unit: expected cosine above 0, got 0")
    if method.feature_loss == "none" and method.classifier_images != "own":
        raise ValueError(f"classifier_images must be 'own' without a feature loss, got {method.classifier_images!r}")
    if method.schedule == "two-stage" and method.classifier_images != "own":
        raise ValueError(f"classifier_images must be 'own' for schedule 'two-stage', got {method.classifier_images!r}")
    epochs = config.optimiser.epochs
    if method.schedule == "two-stage" and switch_epoch(method.switch_at, epochs) == epochs:
        raise ValueError(f"switch_at must leave the second of two stages an epoch of {epochs}, got {method.switch_at}")
    if method.classifier_images != "own" and method.sampler != method.feature_sampler:
        raise ValueError(
            f"sampler has no effect where classifier_images is {method.classifier_images!r}: expected feature_sampler's "
            f"{method.feature_sampler!r}, got {method.sampler!r}"
        )
    if method.classifier_images == "views" and config.optimiser.classifier_batch not in (None, config.optimiser.batch):
        raise ValueError("classifier_batch has no effect where classifier_images is 'views': expected None")
    if method.tau_normalisation and method.cosine:
        raise ValueError("tau_normalisation acts on a linear classifier: expected cosine 0")
    for name in ("reweight_from", "weighted_mean"):
        if getattr(method, name) != getattr(rest, name) and not method.class_weights:
            raise ValueError(f"{name} acts on class_weights alone, which are 0")


# ---- config.json


def as_json(config: Config) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(stored: dict[str, Any], where: Path) -> Config:
    """What :func:`as_json` wrote. A setting that is missing or unknown is of another version of the code, and an error."""
    parts = {}
    if unknown := sorted(stored.keys() - set(GROUPS)):
        raise ValueError(f"{where} must hold the settings of this version, and differs in {', '.join(unknown)}: written by another one?")
    for group, kind in typing.get_type_hints(Config).items():
        given = stored.get(group)
        hints = typing.get_type_hints(kind)
        if not isinstance(given, dict) or given.keys() != hints.keys():
            wrong = sorted(given.keys() ^ hints.keys()) if isinstance(given, dict) else [group]
            raise ValueError(f"{where} must hold the settings of this version, and differs in {', '.join(wrong)}: written by another one?")
        parts[group] = kind(**{name: _typed(value, hints[name], f"{where}: {name}") for name, value in given.items()})
    return Config(**parts)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """JSON has lists for tuples, strings for paths, and no word for a float without a fraction."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list) and (inner[-1] is Ellipsis or len(value) == len(inner)):
        return tuple(_typed(one, inner[0], name) for one in value)
    of_json = {float: (int, float), Path: (str,)}.get(kind, (str if typing.get_origin(kind) is Literal else kind,))
    if type(value) in of_json and not (kind is float and not math.isfinite(value)):
        return Path(value) if kind is Path else value
    raise ValueError(f"{name} must be {str(hint).replace('typing.', '') if inner or len(kinds) > 1 else kind.__name__}, got {value!r}")


def read(path: Path) -> Config:
    """Of a config.json, or of the folder of a run."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a run's folder or its config.json")
    return from_json(checkpoint.read_json(path), path)
