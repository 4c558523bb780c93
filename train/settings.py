"""What a run is told: its settings in groups, the recipe of a data set and a method, and config.json."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import checkpoint
import exports
import idle
import processes
import torch
import tyro
from augment import AUGMENTATIONS, Augmentation
from data import DATASETS, Source, check_source, defaults
from idle import Acts, among, by
from methods import CLASSIFIER_LOSSES, FEATURE_LOSSES, METHODS, Method, passes
from networks import CIFAR_RESNETS, DTYPES, ON_FEATURES, check_pretrained, is_timm, make_backbone, timm_settings
from packages import need
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
    base = recipe(data, method, paper=paper, network=trained_network(**settings))
    return refuse_idle(checked(change(base, **settings)), base)


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

# What a number must be; one of several numbers each by itself. None, where a setting may be it, is left alone.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "be positive",
        lambda x: x > 0,
        "epochs batch classifier_batch lr lr_factor clip temperature prototypes_per_class positives most_shown width hidden embedding "
        "image_size largest_class seeds jobs threads eval_every eval_batch log_every keep_every",
    ),
    (
        "not be negative",
        lambda x: x >= 0,
        "weight_decay workers many few loss_weights queue positive_weight logit_adjustment focal_gamma margin cosine mixup "
        "tau_normalisation",
    ),
    ("be at least 1", lambda x: x >= 1, "imbalance"),
    ("lie in [0, 1)", lambda x: 0 <= x < 1, "warmup switch_at momentum validation class_weights reweight_from dropout"),
    ("lie in (0, 1)", lambda x: 0 < x < 1, "ema momentum_encoder milestones"),
    ("lie in [0, 2**32)", lambda x: 0 <= x < 2**32, "seed data_seed"),
)


def _channels(data: str) -> int:
    """Of an image; 0 where the data are features."""
    shape = DATASETS[data].shape
    return 3 if shape is None else shape[0] if shape else 0


def _of_files(data: str) -> bool:
    return DATASETS[data].shape is None


def _draws(values: idle.Values) -> bool:
    """Whether it depends on a seed which images there are: of digits, and of a folder that has no splits, the test set does."""
    return values["data"] in ("digits", "folder") or values["imbalance"] is not None or values["validation"] > 0


def _trains_first(values: idle.Values) -> bool:
    return _chosen(values["feature_loss"]) or values["schedule"] == "two-stage"


def _has_another_prior(values: idle.Values) -> bool:
    """Than the uniform one of class-balanced batches: in training, or in the first of two stages."""
    classifies_first = not _chosen(values["feature_loss"]) and values["schedule"] == "two-stage"
    return values["sampler"] != "class-balanced" or (classifies_first and values["feature_sampler"] != "class-balanced")


def _batches_by_batch(values: idle.Values) -> bool:
    return _chosen(values["feature_loss"]) or values["classifier_batch"] is None


def _chosen(name: str) -> bool:
    return name != "none"


# What is done to an image. The colours, mean and std, are also those by which images are evaluated.
OPERATIONS = [one.name for one in dataclasses.fields(Augmentation) if one.name not in ("mean", "std")]
OF_CLASSIFIER = " ".join(["augment_as", *(f"augment.{name}" for name in OPERATIONS)])
OF_FEATURES = "temperature loss_weights hidden embedding backend feature_augment. feature_augment_as"
OF_IMAGES = "augment. feature_augment. augment_as feature_augment_as channels_last weights pretrained"

OF_SOURCE = (
    by("check skip_bad_images", "image files", "data", _of_files),
    Acts("data_seed data_seeds", "images that imbalance or validation draws", _draws, "data"),
)
# The settings that act beside some choices alone: on what, and the setting that decides it. Those of the data are in check_source too.
ACTS = (
    by(OF_FEATURES, "a feature_loss", "feature_loss", _chosen),
    by(f"sampler classifier_images class_weights mixup {OF_CLASSIFIER}", "a classifier_loss", "classifier_loss", _chosen),
    by(f"classifier_batch mixup {OF_CLASSIFIER}", "the classifier's own images", "classifier_images", lambda images: images != "views"),
    by("classifier_batch", "a classifier_loss", "classifier_loss", _chosen),
    Acts("feature_sampler", "a feature_loss or the first of two stages", _trains_first, "feature_loss"),
    Acts("batch", "a feature_loss, beside classifier_batch,", _batches_by_batch, "feature_loss"),
    among("prototypes_per_class", "feature_loss", "mpsc"),
    among("denominator", "feature_loss", "psc", "mpsc"),
    among("positives", "feature_loss", "kcl"),
    among("momentum_encoder", "feature_loss", "paco"),
    among("queue positive_weight", "feature_loss", "paco", "gpaco"),
    among("focal_gamma", "classifier_loss", "focal"),
    among("margin", "classifier_loss", "ldam"),
    among("logit_adjustment", "classifier_loss", "ce"),
    Acts("logit_adjustment", "a sampler other than class-balanced", _has_another_prior, "sampler"),
    Acts("most_shown", "sampler budgeted", lambda v: "budgeted" in (v["sampler"], v["feature_sampler"]), "sampler"),
    among("switch_at", "schedule", "switch", "two-stage"),
    among("nesterov", "optimiser", "sgd"),
    by("lr_factor", "milestones", "milestones"),
    by("reweight_from weighted_mean", "class_weights", "class_weights"),
    by("tau_normalisation", "a linear classifier", "cosine", lambda scale: scale == 0),
    by("width", "a CIFAR ResNet or mlp", "network", lambda network: network in (*CIFAR_RESNETS, "mlp")),
    by("pretrained", "a timm network", "network", is_timm),
    by("pretrained", "a network without weights from a file", "weights", lambda path: path is None),
    by("dropout", "data that are features", "data", lambda data: _channels(data) == 0),
    by(OF_IMAGES, "images", "data", _channels),
    by("augment.grayscale feature_augment.grayscale", "images of three channels", "data", lambda data: _channels(data) == 3),
    *(by(f"{group}.color_jitter_probability", f"{group}.color_jitter", f"{group}.color_jitter") for group in AUGMENTS),
    *OF_SOURCE,
    by("workers", "image files", "data", _of_files),
    by("data_seed", "runs that share one tail", "data_seeds", lambda own: not own),
    Acts("jobs", "several runs, of seeds or against others,", lambda v: v["seeds"] > 1 or v["against"], "seeds"),
    Acts("keep_every", "runs of as many epochs", lambda v: v["keep_every"] is None or v["keep_every"] <= v["epochs"], "epochs"),
    by("keep_every log_every log_to jobs seeds against", "training", "eval_only", lambda run: run is None),
    *(by("out", "a run that begins", name, lambda run: run is None) for name in ("eval_only", "resume")),
)  # fmt: skip


def _values(config: Config) -> dict[str, Any]:
    return {f"{group}.{name}" if group in AUGMENTS else name: value for group, name, value in settings_of(config)}


def refuse_idle(config: Config, base: Config, command: idle.Values = types.MappingProxyType({})) -> Config:
    """The config, where all that differs from ``base``, and so was given, acts, in its own run or in one that it is compared with.

    ``command`` is what was asked beside the settings, None where it was not.
    """
    values = _values(config) | dict(command)
    before = _values(base) | dict.fromkeys(command)
    given = [name for name in (*command, *_values(config)) if values[name] != before[name]]
    for name in OPERATIONS + ["mean", "std"]:  # change() gives both branches one: it is enough that it acts in either
        both = [f"{group}.{name}" for group in AUGMENTS]
        if set(both) <= set(given) and values[both[0]] == values[both[1]]:
            given.remove(both[values["feature_loss"] == "none"])
    of_method = vars(config.method).keys()  # the others have their own
    idle.refuse(ACTS, [name for name in given if name in of_method], [values])
    others = [vars(method_of(config.images.data, name)) for name in config.records.against if name in METHODS]
    idle.refuse(ACTS, [name for name in given if name not in of_method], [values, *(values | method for method in others)])
    return config


def checked(config: Config) -> Config:
    """Everything checked that can be without the data; the device named."""
    _check_values(config)
    if list(config.optimiser.milestones) != sorted(set(config.optimiser.milestones)):
        raise ValueError(f"milestones must increase, got {config.optimiser.milestones}")
    if config.optimiser.nesterov and config.optimiser.optimiser == "sgd" and not config.optimiser.momentum:
        raise ValueError(f"momentum must be positive beside nesterov, got {config.optimiser.momentum}")
    if config.records.seed + config.records.seeds > 2**32:
        raise ValueError(f"seeds must end below 2**32, got {config.records.seeds} from seed {config.records.seed}")
    check_source(config.images)
    _check_method(config)
    refuse_idle(config, dataclasses.replace(config, method=Method()))
    device = usable_device(config.machine.device)
    exports.check(config.records.export)
    for package in config.records.log_to:
        need(package, f"log_to {package!r}")
    _check_network(config)
    if config.method.feature_loss != "none":  # raises where this backend cannot serve
        select_backend(config.machine.backend, processes.device(device), DTYPES[config.machine.precision], config.network.embedding)
    return change(config, device=device)


def _check_values(config: Config) -> None:
    """Each by itself."""
    for group in GROUPS:
        _check_types(getattr(config, group))
    check_ranges(_values(config))


def check_ranges(values: idle.Values) -> None:
    """Of the numbers among some settings."""
    several = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    for name, value in several.items():
        if any(isinstance(one, float) and not math.isfinite(one) for one in value):
            raise ValueError(f"{name} must be finite, got {values[name]}")
    for what, holds, names in RANGES:
        for name in names.split():
            if name in values and not all(one is None or holds(one) for one in several[name]):
                raise ValueError(f"{name} must {what}, got {values[name]}")


def usable_device(chosen: str) -> str:
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=processes.device(chosen)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {chosen!r} is not usable here: {str(error).splitlines()[0]}") from error
    return chosen


def _check_types(part: Any) -> None:
    """A group, for Python may give what the command line would refuse. A data set may be one that was added to the table."""
    for name, hint in typing.get_type_hints(type(part)).items():
        value = getattr(part, name)
        if not _is(value, str if name == "data" else hint):
            raise ValueError(f"{name} must be {_told(hint)}, got {value!r}")


def _is(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_is(value, kind) for kind in kinds)
    if typing.get_origin(hint) is Literal:
        return value in kinds
    if typing.get_origin(hint) is tuple:
        several = kinds[-1] is Ellipsis
        inner = [kinds[0]] * len(value) if several and isinstance(value, tuple) else kinds
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is, value, inner))
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def _told(hint: Any) -> str:
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_told, kinds))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, kinds))}"
    if typing.get_origin(hint) is tuple:
        return f"a tuple, each {_told(kinds[0])}" if kinds[-1] is Ellipsis else f"a tuple of {len(kinds)}, each {_told(kinds[0])}"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a Path", type(None): "None"}[hint]


def _check_network(config: Config) -> None:
    """Raises where there is no such network, or no such use of it."""
    network, given, views = config.network, config.images.data, FEATURE_LOSSES[config.method.feature_loss]
    with torch.device("meta"):
        make_backbone(network.network, 3, network.width)
    if network.pretrained:
        check_pretrained(network.network)
    channels, on_features = _channels(given), network.network in ON_FEATURES
    if channels == 0 and not on_features:
        raise ValueError(f"network must be {' or '.join(ON_FEATURES)} for data {given!r}, which are features, got {network.network!r}")
    if on_features and channels:
        raise ValueError(f"network {network.network!r} takes features, and data {given!r} is images")
    for group in AUGMENTS:
        if len(mean := getattr(config, group).mean) not in (1, channels or 1):
            raise ValueError(f"{group}.mean must have a value for each channel, {channels} of data {given!r}, got {mean}")
    if not on_features:
        return
    if network.network == "none" and views.views and not views.trains_classifier:
        raise ValueError(
            f"feature_loss {config.method.feature_loss!r} would have no influence on the classifier where network is 'none': expected "
            "'mlp', whose hidden layer both train"
        )
    if views.views + views.keys > 1 and not network.dropout:
        raise ValueError(
            f"feature_loss {config.method.feature_loss!r} compares views of an image, and those of features are equal: expected dropout "
            "above 0, which makes them differ, or a loss of one view (sc-one-view, psc, mpsc), got dropout 0"
        )


def _check_method(config: Config) -> None:
    method = config.method
    named(METHODS, "method", method.method)
    named(FEATURE_LOSSES, "feature_loss", method.feature_loss)
    named(CLASSIFIER_LOSSES, "classifier_loss", method.classifier_loss)
    named(SCHEDULES, "schedule", method.schedule)
    if not any(method.loss_weights):
        raise ValueError(f"loss_weights must not both be 0, got {method.loss_weights}")
    parametric = method.feature_loss in ("paco", "gpaco")  # whose logits of the classifier are in their loss
    if method.classifier_loss == "none" and not parametric:
        raise ValueError(
            f"classifier_loss 'none' needs a feature loss that trains the classifier (paco, gpaco), got {method.feature_loss!r}"
        )
    if method.classifier_loss == "none" and method.schedule == "two-stage":
        raise ValueError("schedule 'two-stage' needs a classifier_loss for its second stage, got 'none'")
    if parametric and method.cosine:
        raise ValueError(f"feature_loss {method.feature_loss!r} needs a linear classifier: expected cosine 0, got {method.cosine}")
    if method.feature_loss == "none" and method.schedule not in ("sum", "two-stage"):
        raise ValueError(f"schedule must be 'sum' or 'two-stage' without a feature loss, got {method.schedule!r}")
    if method.classifier_loss == "ldam" and not method.cosine:
        raise ValueError("classifier_loss 'ldam' needs a cosine classifier, whose scale is its unit: expected cosine above 0, got 0")
    if method.feature_loss == "none" and method.classifier_images != "own":
        raise ValueError(f"classifier_images must be 'own' without a feature loss, got {method.classifier_images!r}")
    if method.schedule == "two-stage" and method.classifier_images != "own":
        raise ValueError(f"classifier_images must be 'own' for schedule 'two-stage', got {method.classifier_images!r}")
    if method.schedule == "two-stage" and "budgeted" in (method.sampler, method.feature_sampler):
        raise ValueError(
            "sampler and feature_sampler must not be 'budgeted' for schedule 'two-stage', whose stages have no budget of their own"
        )
    epochs = config.optimiser.epochs
    if method.schedule == "two-stage" and switch_epoch(method.switch_at, epochs) == epochs:
        raise ValueError(f"switch_at must leave the second of two stages an epoch of {epochs}, got {method.switch_at}")
    if method.classifier_images != "own" and method.sampler != method.feature_sampler:
        raise ValueError(
            f"sampler has no effect where classifier_images is {method.classifier_images!r}: expected feature_sampler's "
            f"{method.feature_sampler!r}, got {method.sampler!r}"
        )
    batch, classifier_batch = config.optimiser.batch, config.optimiser.classifier_batch
    if method.classifier_images == "shared" and classifier_batch not in (None, batch):
        raise ValueError(f"classifier_batch must be batch where both branches share images, {batch}, got {classifier_batch}")


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
        parts[group] = kind(**{name: _of_json(value, hints[name]) for name, value in given.items()})
    config = Config(**parts)
    try:
        _check_values(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config


def _of_json(value: Any, hint: Any) -> Any:
    """JSON has lists for tuples, and texts for paths."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *typing.get_args(hint)) else value


def read(path: Path) -> Config:
    """Of a config.json, or of the folder of a run."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a run's folder or its config.json")
    return from_json(checkpoint.read_json(path), path)
