"""Train a hybrid network on long-tailed images: contrastive features and a balanced classifier, from one to the other as training goes on.

    L = alpha L_feature(instance-balanced batch) + (1 - alpha) L_CE(class-balanced batch),    alpha = 1 - (T / T_max)^2

after Wang et al., CVPR 2021. With no argument it trains on scikit-learn's digits, made long-tailed 100 ... 5; no network, no GPU needed.

    python train/hybrid.py                                                # digits, the supervised contrastive loss
    python train/hybrid.py --loss psc --seeds 6                           # the prototypical one, six seeds, mean and spread
    python train/hybrid.py --data cifar10-lt --imbalance 100              # the paper's CIFAR-10-LT; downloads
    python train/hybrid.py --data list --root D --train-list A --test-list B --network resnet50
    python train/hybrid.py --resume runs/X                                # go on after Ctrl-C, SIGTERM or a crash, to the same bits
    torchrun --nproc-per-node 2 train/hybrid.py                           # the same batches shared out among processes

A setting left at None is the data set's recipe, where nothing else is said; config.json in the run's folder tells what it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import checkpoint
import data as datasets
import evaluate
import plots
import processes
import torch
import tyro
from augment import Augmentation, Draws
from networks import HybridNetwork, freeze_below_classifier, make_backbone
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sampling import Rule, Sampler
from schedule import Schedule, feature_weight, learning_rate
from torch import Tensor, nn

from fastsupcon import PSCLoss, SupConLoss
from fastsupcon.backends import select as select_backend

console = Console()


@dataclass(frozen=True)
class Config:
    # -- data
    data: datasets.DataName = "digits"  # all but digits need --root or a download
    root: Path | None = None  # folder of the data; None: download, where that is possible
    train_list: Path | None = None  # for --data list: one "relative/path label" a line
    val_list: Path | None = None  # chooses the best epoch, as --validation does
    test_list: Path | None = None
    imbalance: float | None = None  # images of the largest class over those of the smallest
    largest_class: int | None = None  # images of class 0; None: as many as the imbalance allows
    validation: float = 0.0  # fraction of train held out to choose the best epoch; 0: the last epoch is chosen
    image_size: int = 224  # side of images that are decoded from files
    workers: int = 8  # processes that decode files; under torchrun so many for each of its own
    data_seed: int = 0  # which images the long tail keeps; 0 is the field's convention
    many: int | None = None  # many-shot: more training images than this
    few: int | None = None  # few-shot: fewer than this

    # -- method
    loss: Literal["sc", "psc", "mpsc", "ce"] = "sc"  # of the feature branch; ce: no feature branch, the classifier alone
    temperature: float | None = None  # of the feature loss
    prototypes_per_class: int = 4  # of mpsc
    denominator: Literal["negatives", "all"] = "negatives"  # psc, mpsc: "all" puts the own prototypes back
    schedule: Schedule = "parabolic-decay"  # of alpha
    switch_at: float = 0.5  # fraction of the epochs at which "switch" and "two-stage" go from features to classifier
    feature_sampler: Rule = "instance"  # of the feature branch
    sampler: Rule | None = None  # of the classifier branch; None: class-balanced, and instance for --loss ce
    logit_adjustment: float = 0.0  # this x log(class prior) is added to the logits in training: 0 is CE, 1 balanced softmax

    # -- network
    network: str | None = None  # a CIFAR ResNet (resnet8 ... resnet110) or a timm name
    width: int = 16  # channels of a CIFAR ResNet's first stage
    hidden: int | None = None  # of the projection head
    embedding: int | None = None  # its output

    # -- optimisation
    epochs: int | None = None  # an epoch is one pass of the feature branch (of the classifier branch for --loss ce)
    batch: int | None = None  # images of the feature branch, each in two views for sc; of all processes together
    classifier_batch: int | None = None  # None: as many as batch
    lr: float | None = None  # at its peak
    warmup: float | None = None  # fraction of the steps
    milestones: tuple[float, ...] | None = None  # fractions of the steps at which lr drops to a tenth; none: cosine
    momentum: float = 0.9
    nesterov: bool | None = None
    weight_decay: float | None = None
    clip: float | None = None  # largest norm of the gradient
    ema: float | None = None  # decay of a running average of the weights, which is then what is evaluated

    # -- augmentation, on the device, the same for both branches
    crop_padding: int | None = None  # pixels of zeros around the image, then a random crop of the old size
    flip: bool | None = None  # left to right, half of the images
    rotate: float | None = None  # degrees, either way
    shift: float | None = None  # of the side, either way
    zoom: float | None = None  # scale in 1 -+ zoom
    grayscale: float | None = None  # probability
    color_jitter: float = 0.0  # strength; SimCLR's is 0.5 on CIFAR, 1 on ImageNet
    randaugment: int = 0  # operations per image

    # -- machine
    device: str | None = None  # None: cuda where there is one, else cpu
    backend: str = "auto"  # fastsupcon's: auto, cuda, triton, cpu, chunked, reference
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # the network, by torch.compile
    channels_last: bool = True  # memory layout of images and convolutions
    threads: int | None = None  # None: torch's choice

    # -- run
    seed: int = 0  # of weights, samplers and augmentation
    seeds: int = 1  # train this many, seed, seed + 1, ..., and report mean and spread
    out: Path | None = None  # None: runs/DATA-LOSS-DATE
    eval_every: int | None = None  # epochs; None: ten times in all
    log_every: int = 50  # steps between two readings of the loss inside an epoch
    pictures: bool = True  # per class, confusion, embedding, curves
    tensorboard: bool = False  # events beside log.jsonl
    export: bool = False  # the chosen weights as model.safetensors
    resume: Path | None = None  # continue the run in this folder, whose settings hold
    eval_only: Path | None = None  # evaluate the run in this folder again


# What is known to work, by data set. CIFAR: the paper's settings. Digits: chosen on seeds that no reported figure uses.
CIFAR = {
    "imbalance": 100, "network": "resnet32", "hidden": 64, "embedding": 128, "epochs": 200, "batch": 512, "lr": 0.5, "warmup": 0.0,
    "milestones": (0.6, 0.8), "nesterov": False, "weight_decay": 1e-4, "temperature": 0.1, "many": 100, "few": 20,
    "crop_padding": 4, "flip": True, "grayscale": 0.2, "rotate": 0.0, "shift": 0.0, "zoom": 0.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
}  # fmt: skip
FILES = CIFAR | {
    "imbalance": None, "network": "resnet50", "hidden": 2048, "epochs": 90, "batch": 128, "lr": 0.1, "milestones": (), "weight_decay": 5e-4,
    "nesterov": True, "crop_padding": 0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
DIGITS = CIFAR | {
    "imbalance": 20, "network": "resnet8", "hidden": 128, "embedding": 64, "epochs": 53, "batch": 64, "lr": 0.1, "warmup": 0.05,
    "milestones": (), "nesterov": True, "weight_decay": 5e-4, "many": 40, "few": 15,
    "crop_padding": 0, "flip": False, "grayscale": 0.0, "rotate": 15.0, "shift": 0.1, "zoom": 0.1, "mean": (0.3,), "std": (0.38,),
}  # fmt: skip
RECIPES = {
    "digits": DIGITS,
    "mnist": DIGITS | {"imbalance": 100, "many": 100, "few": 20, "mean": (0.1307,), "std": (0.3081,)},
    "fashion-mnist-lt": CIFAR | {"grayscale": 0.0, "mean": (0.2860,), "std": (0.3530,)},
    "cifar10-lt": CIFAR,
    "cifar10-jpeg": CIFAR,
    "cifar100-lt": CIFAR,
    "folder": FILES,
    "list": FILES,
}
PROTOTYPES = {"cifar10-lt": {"temperature": 1.0}, "cifar10-jpeg": {"temperature": 1.0}, "digits": {"temperature": 0.5, "epochs": 80}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VIEWS = {"sc": 2, "psc": 1, "mpsc": 1, "ce": 0}


def recipe(config: Config) -> dict[str, Any]:
    of_loss = PROTOTYPES.get(config.data, {}) if config.loss in ("psc", "mpsc") else {}
    if config.data == "digits" and config.loss == "ce":
        of_loss = {"epochs": 160}  # at batch 64 this many images pass the network: as many as in the other two (51,200)
    return RECIPES[config.data] | of_loss


def resolve(config: Config) -> Config:
    """The recipe filled in, and everything checked that can be without the data."""
    chosen = recipe(config) | {"sampler": "instance" if config.loss == "ce" else "class-balanced"}
    chosen["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    chosen["out"] = Path("runs") / f"{config.data}-{config.loss}-{time.strftime('%Y%m%d-%H%M%S')}"
    fields = {f.name for f in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{k: v for k, v in chosen.items() if k in fields and getattr(config, k) is None})
    config = dataclasses.replace(
        config,
        classifier_batch=config.batch if config.classifier_batch is None else config.classifier_batch,
        eval_every=max(1, config.epochs // 10) if config.eval_every is None else config.eval_every,
    )
    positive = ("epochs", "batch", "classifier_batch", "lr", "temperature", "width", "hidden", "embedding", "seeds", "eval_every")
    for name in (*positive, "log_every", "prototypes_per_class", "image_size", "clip", "threads"):
        if (value := getattr(config, name)) is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("weight_decay", "workers", "crop_padding", "rotate", "shift", "color_jitter", "randaugment"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")
    for name in ("warmup", "switch_at", "momentum", "zoom", "validation"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
    if not 0 <= config.grayscale <= 1:
        raise ValueError(f"grayscale must lie in [0, 1], got {config.grayscale}")
    if not all(0 < milestone < 1 for milestone in config.milestones):
        raise ValueError(f"milestones must lie in (0, 1), got {config.milestones}")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ValueError(f"ema must lie in (0, 1), got {config.ema}")
    if config.schedule == "two-stage" and config.loss == "ce":
        raise ValueError("schedule 'two-stage' needs a feature loss (sc, psc or mpsc) for its first stage, got loss 'ce'")
    try:
        device = processes.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device!r} is not usable here: {error}") from error
    for option, package in (("export", "safetensors"), ("tensorboard", "tensorboard")):
        if getattr(config, option) and find_spec(package) is None:
            raise ValueError(f"{option} needs the package {package} (the [train-extra] extra), which is not installed")
    with torch.device("meta"):  # raises where there is no such network
        make_backbone(config.network, 3, config.width)
    if config.loss != "ce":  # raises where this backend cannot serve
        select_backend(config.backend, device, DTYPES[config.precision], config.embedding)
    return config


def source_of(config: Config) -> datasets.Images:
    names = {f.name for f in dataclasses.fields(datasets.Images)}
    return datasets.Images(**{name: getattr(config, name) for name in names})


class Run:
    """A network in training: one step of it, and everything that a checkpoint holds. Processes share the steps, and all hold the same."""

    def __init__(self, config: Config, data: datasets.Data) -> None:
        self.config, self.data, self.device = config, data, processes.device(config.device)
        self.classes = len(data.classes)
        for name in ("batch", "classifier_batch"):
            if (images := getattr(config, name)) < processes.count():
                raise ValueError(f"{name} must be at least the number of processes, {processes.count()}, got {images}")
        torch.manual_seed(config.seed)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        backbone = make_backbone(config.network, data.train.channels, config.width)
        network = HybridNetwork(backbone, self.classes, config.hidden, config.embedding)
        network = processes.share_batch_statistics(network, self.device)
        self.network = network.to(self.device, memory_format=self.layout)
        self.forward = torch.compile(self.network) if config.compile else self.network
        self.feature_loss = make_feature_loss(config, self.classes).to(self.device)
        self.parameters = [*self.network.parameters(), *self.feature_loss.parameters()]
        self.lr = torch.zeros((), device=self.device)  # a tensor, as is alpha: a new value is written, nothing compiled or waited for
        options = {"momentum": config.momentum, "nesterov": config.nesterov, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.SGD(self.parameters, lr=self.lr, fused=True, **options)
        for p in self.parameters:  # or a first step that fp16 skips would leave torch's fused SGD with buffers it never filled
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.autocast = torch.autocast(self.device.type, DTYPES[config.precision], enabled=config.precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.ema = None
        if config.ema is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
            self.ema = torch.optim.swa_utils.AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)

        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        self.batches = {
            name: datasets.Batches(split, self.device, config.image_size, config.workers) for name, split in parts.items() if split
        }
        self.augmentation = Augmentation(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(Augmentation) if hasattr(config, f.name)},
            mean=RECIPES[config.data]["mean"],
            std=RECIPES[config.data]["std"],
        )
        self.log_prior = (data.counts / data.counts.sum()).log().to(self.device)
        self.samplers = {
            "feature": Sampler(data.train.labels, config.feature_sampler, 2 * config.seed),
            "classifier": Sampler(data.train.labels, config.sampler, 2 * config.seed + 1),
        }
        self.steps = max(1, len(data.train) // (config.classifier_batch if config.loss == "ce" else config.batch))

        self.epoch, self.step, self.lr_now = 0, 0, 0.0  # step: inside the epoch
        self.alpha = torch.zeros((), device=self.device)
        # Feature loss, classifier loss and share right, of this epoch. Each process has its part; what is meant is the sum over them.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.used: list[nn.Module] = []
        self.history: list[dict[str, Any]] = []
        self.best = {"epoch": config.epochs - 1, "balanced": -1.0}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """What this epoch trains, and the indices [steps, rows of a batch] it trains on, the feature branch's once for each view."""
        config = self.config
        self.drawn_from = {name: sampler.state_dict() for name, sampler in self.samplers.items()}
        options = {"switch_at": config.switch_at, "seed": config.seed}
        self.alpha_now = 0.0 if config.loss == "ce" else feature_weight(config.schedule, self.epoch, config.epochs, **options)
        self.alpha.fill_(self.alpha_now)
        switch = math.ceil(config.switch_at * config.epochs) if config.schedule == "two-stage" else 0
        self.second_stage = config.schedule == "two-stage" and self.epoch >= switch
        self.stage = (switch, config.epochs) if self.second_stage else (0, switch or config.epochs)  # each with its own course of lr
        self.views = 0 if self.second_stage else VIEWS[config.loss]
        self.classifies = config.schedule != "two-stage" or self.second_stage
        self.network.train()
        if self.second_stage:
            freeze_below_classifier(self.network)
        parts = []
        if self.views:
            parts.append(self.samplers["feature"].draw(self.steps * config.batch).view(self.steps, -1).repeat(1, self.views))
        if self.classifies:
            parts.append(self.samplers["classifier"].draw(self.steps * config.classifier_batch).view(self.steps, -1))
        self.plan = torch.cat(parts, 1)
        ends = list(itertools.accumulate([config.batch] * self.views + [config.classifier_batch] * self.classifies, initial=0))
        own = [torch.tensor(processes.part(end - start)) + start for start, end in itertools.pairwise(ends)]
        self.columns, self.split = torch.cat(own), sum(map(len, own[: self.views]))  # of the plan's rows this process has these
        self.draws = Draws(ends[-1], self.device, None if processes.count() == 1 else self.columns.to(self.device))
        used = [self.network.backbone]
        used += [self.network.head, self.feature_loss] if self.views else []
        used += [self.network.classifier] if self.classifies else []
        if used != self.used:  # at the start, and where the second of two stages begins
            self.used, parameters = used, [p for module in used for p in module.parameters() if p.requires_grad]
            self.averaged_losses = processes.averaging(self.losses, parameters)

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, whose gradient is the mean over the processes; and this process's part of ``sums``."""
        config, count = self.config, processes.count()
        z, logits = self.forward(images, self.split)
        feature_loss = self.feature_loss(z, labels[: self.split]) if self.views else self.alpha.new_zeros(())  # the same on every process
        adjusted, labels = logits.float() + config.logit_adjustment * self.log_prior, labels[self.split :]
        part = len(labels) / config.classifier_batch
        classifier_loss = part * nn.functional.cross_entropy(adjusted, labels) if self.classifies else self.alpha.new_zeros(())
        loss = self.alpha * feature_loss + (1 - self.alpha) * (count * classifier_loss)
        right = (logits.argmax(1) == labels).sum() / config.classifier_batch
        return loss, torch.stack([feature_loss.detach() / count, classifier_loss.detach(), right])

    def update(self, raw: Tensor, labels: Tensor) -> None:
        """One step: both batches through the backbone as one."""
        config, (first, last) = self.config, self.stage
        done, total = (self.epoch - first) * self.steps + self.step, (last - first) * self.steps
        self.lr_now = learning_rate(config.lr, done, total, warmup=config.warmup, milestones=config.milestones)
        self.lr.fill_(self.lr_now)
        images = self.augmentation.train(raw, self.draws).contiguous(memory_format=self.layout)
        with self.autocast:
            loss, measured = self.averaged_losses(images, labels)
        self.scaler.scale(loss).backward()
        if config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.sums += measured
        self.step += 1

    def means(self) -> dict[str, float | None]:
        """Of the epoch so far, over all processes, each of which must ask. Waits for the device."""
        feature, classifier, right = (processes.total(self.sums) / self.step).tolist()
        return {
            "alpha": self.alpha_now,
            "lr": self.lr_now,
            "feature_loss": feature if self.views else None,
            "chance": chance_level(self.config, self.classes) if self.views else None,
            "classifier_loss": classifier if self.classifies else None,
            "train_accuracy": 100 * right if self.classifies else None,
        }

    def end_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        self.begin_epoch()

    @property
    def evaluated(self) -> nn.Module:
        return self.network if self.ema is None else self.ema.module

    def predict(self, part: str) -> tuple[Tensor, Tensor, Tensor]:
        predicted = evaluate.predict(self.evaluated, self.batches[part], self.augmentation, self.autocast)
        self.network.train()
        return predicted

    def _modules(self) -> dict[str, Any]:
        modules = {"network": self.network, "feature_loss": self.feature_loss, "optimizer": self.optimizer, "scaler": self.scaler}
        return modules | ({} if self.ema is None else {"ema": self.ema})

    def state_dict(self) -> dict[str, Any]:
        """The same on every process, each of which must ask, and for any number of them to go on from."""
        return {
            **{name: module.state_dict() for name, module in self._modules().items()},
            "samplers": self.drawn_from,  # as the epoch began: its indices are drawn again, and the steps done are left out
            "random": checkpoint.random_state(self.device),
            "sums": processes.total(self.sums),
            **{name: getattr(self, name) for name in ("epoch", "step", "lr_now", "history", "best")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.lr = self.optimizer.param_groups[0]["lr"] = self.lr.fill_(0)
        for name, sampler in self.samplers.items():
            sampler.load_state_dict({key: value.cpu() for key, value in state["samplers"][name].items()})
        for name in ("epoch", "step", "lr_now", "history", "best"):
            setattr(self, name, state[name])
        self.sums = state["sums"] if processes.rank() == 0 else torch.zeros_like(self.sums)
        self.begin_epoch()
        checkpoint.set_random_state(state["random"], self.device)


def make_feature_loss(config: Config, classes: int) -> nn.Module:
    if config.loss == "ce":
        return nn.Identity()
    if config.loss == "sc":
        options = {"normalize": True, "backend": config.backend, "group": processes.group()}
        return SupConLoss(config.temperature, base_temperature=config.temperature, **options)
    options = {"denominator": config.denominator, "backend": config.backend, "group": processes.group()}
    return PSCLoss(classes, config.embedding, config.temperature, prototypes_per_class=prototypes(config), **options)


def prototypes(config: Config) -> int:
    return config.prototypes_per_class if config.loss == "mpsc" else 1


def chance_level(config: Config, classes: int) -> float:
    """The feature loss where all similarities are equal: log of the number of terms in its denominator."""
    if config.loss == "sc":
        return math.log(VIEWS["sc"] * config.batch - 1)
    return math.log((classes - (config.denominator == "negatives")) * prototypes(config))


def train(config: Config, data: datasets.Data, *, resume: bool = False) -> dict[str, Any]:
    """Train one network in ``config.out``; returns its metrics. A stop signal ends the process after a checkpoint."""
    out, writes = config.out, processes.rank() == 0
    if not resume and processes.told((out / "config.json").exists()):
        raise ValueError(f"out {out} holds a run already: go on with --resume {out}, or name another folder")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True  # so that a resumed run comes to the same bits
    run = Run(config, data)
    if resume and processes.told((out / "last.pt").exists()):
        run.load_state_dict(checkpoint.load(out / "last.pt", run.device))
    elif writes:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(out / "environment.json", checkpoint.environment(run.device) | {"processes": processes.count()})
        write_config(config)
    writer = summary_writer(out, run.epoch) if config.tensorboard and writes else None
    monitored = "test" if data.validation is None else "validation"

    with checkpoint.StopSignal() as stop, progress_bar() as progress:
        name, done = "/".join(out.parts[-2:]), run.epoch * run.steps + run.step
        task = progress.add_task(name, total=config.epochs * run.steps, completed=done, text="")

        def leave_if_stopped(*, unsaved: bool) -> None:
            """All processes at the same step, whichever was told to stop; they ask each other at every one."""
            if not (received := processes.largest(stop.received or 0)):
                return
            if unsaved:
                save(run)
            processes.wait_for_all()  # torchrun ends the others as soon as one has left
            progress.stop()
            console.print(f"stopped in epoch {run.epoch}; go on with: python train/hybrid.py --resume {out}", soft_wrap=True)
            sys.exit(128 + received)

        while run.epoch < config.epochs:
            began, first = time.perf_counter(), run.step
            for raw, labels in run.batches["train"](run.plan, first, (config.seed, run.epoch), run.columns):
                run.update(raw, labels)
                progress.advance(task)
                leave_if_stopped(unsaved=True)
                if run.step % config.log_every == 0:
                    progress.update(task, text=status(run.means()))

            row = {"epoch": run.epoch, **run.means(), "processes": processes.count()}
            row["seconds"] = time.perf_counter() - began
            row["images"] = run.plan.numel()
            row["images_per_second"] = (run.step - first) * run.plan.shape[1] / row["seconds"]
            if not all(math.isfinite(row[name] or 0) for name in ("feature_loss", "classifier_loss")):
                raise FloatingPointError(f"the loss is not finite in epoch {run.epoch}: {row}; {out}/last.pt is the epoch before")
            if (run.epoch + 1) % config.eval_every == 0 or run.epoch + 1 == config.epochs:
                _, logits, labels = run.predict(monitored)
                row[f"{monitored}_balanced"] = balanced = evaluate.balanced_accuracy(logits, labels)
                if monitored == "validation" and balanced > run.best["balanced"]:
                    run.best = {"epoch": run.epoch, "balanced": balanced}
                    if writes:
                        checkpoint.save(out / "best.pt", run.evaluated.state_dict())
            run.history.append(row)
            run.end_epoch()
            save(run)
            if writes:
                write_log(run)
            progress.update(task, text=status(row))
            if writer:
                for name in row.keys() - {"epoch", "processes"}:
                    if row[name] is not None:
                        writer.add_scalar(name, row[name], row["epoch"])
            leave_if_stopped(unsaved=False)  # during the evaluation
    if writer:
        writer.close()
    return report(run)


def save(run: Run) -> None:
    state = run.state_dict()
    if processes.rank() == 0:
        checkpoint.save(run.config.out / "last.pt", state)


def write_log(run: Run) -> None:
    checkpoint.write_text(run.config.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))


def report(run: Run) -> dict[str, Any]:
    """Evaluate the last epoch and the best on the test split; write metrics, tables and pictures."""
    config, data, out = run.config, run.data, run.config.out
    measure = {"counts": data.counts, "many": config.many, "few": config.few}
    embeddings, logits, labels = run.predict("test")
    last = chosen = evaluate.metrics(logits, labels, **measure)
    if data.validation is not None:
        run.evaluated.load_state_dict(checkpoint.load(out / "best.pt", run.device))
        embeddings, logits, labels = run.predict("test")
        chosen = evaluate.metrics(logits, labels, **measure)
    result = {
        "chosen_by": "last epoch" if data.validation is None else "validation",
        "best_epoch": run.best["epoch"],
        "best": chosen,
        "last": last,
        "train_images": data.counts.tolist(),
        "updates": run.steps * len(run.history),
        "images": sum(row["images"] for row in run.history),
        "seconds": sum(row["seconds"] for row in run.history),
        "processes": sorted({row.get("processes", 1) for row in run.history}),  # more than one number: it was resumed by other ones
        "config": as_json(config),
    }
    if processes.rank() > 0:
        return result
    write_log(run)  # again: a kill between the last checkpoint and its row would have left it out
    checkpoint.write_json(out / "metrics.json", result)
    evaluate.write_per_class(out / "per_class.csv", data.classes, data.counts, labels, chosen["per_class"])
    if config.pictures:
        plots.per_class(out / "per_class.png", result["train_images"], {out.name: chosen["per_class"]}, data.classes)
        plots.confusion(out / "confusion.png", evaluate.confusion(logits, labels), data.classes)
        plots.embedding(out / "embedding.png", embeddings, labels, data.classes)
        plots.curves(out / "curves.png", run.history)
    if config.export:
        export(run)
    return result


def export(run: Run) -> None:
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in run.evaluated.state_dict().items()}
    checkpoint.write_whole(run.config.out / "model.safetensors", lambda file: file.write(save(weights)))


def summary_writer(out: Path, epoch: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out), purge_step=epoch)  # what a killed run wrote of this epoch and after is hidden


# ---- settings on disk, and what the terminal shows


def as_json(config: Config) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}


def write_config(config: Config) -> None:
    checkpoint.write_json(config.out / "config.json", as_json(config))


FREE = {"resume", "eval_only", "export", "tensorboard", "pictures", "workers", "device", "threads", "root", "log_every"}  # change no result


def read_config(folder: Path, given: Config) -> Config:
    """The settings of the run in ``folder``; of what was given now, only what changes no result counts."""
    changed = {f.name for f in dataclasses.fields(Config) if getattr(given, f.name) != f.default}
    if not changed <= FREE:
        raise ValueError(f"--resume and --eval-only take the run's own settings, got also: {', '.join(sorted(changed - FREE))}")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the folder of a run")
    stored = json.loads(path.read_text())
    for name in ("root", "train_list", "val_list", "test_list"):
        stored[name] = stored[name] and Path(stored[name])
    stored["milestones"] = tuple(stored["milestones"])
    return Config(**stored | {name: getattr(given, name) for name in changed} | {"out": folder, "resume": None, "eval_only": None})


class StatusBelow(Progress):
    """The bar, and a line below it: side by side they would not fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (task.fields["text"] for task in self.tasks)


def progress_bar() -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    return StatusBelow(*columns, console=console, expand=True)


def status(row: dict[str, Any]) -> str:
    shown = {"images_per_second": "{:.0f} images/s", "alpha": "α {:.2f}", "feature_loss": "feature {:.3f}", "chance": "(chance {:.3f})"}
    shown |= {"classifier_loss": "classifier {:.3f}"}
    return "  ".join(text.format(row[name]) for name, text in shown.items() if row.get(name) is not None)


COLUMNS = {"balanced": "balanced", "many": "many", "medium": "medium", "few": "few", "worst": "worst class", "calibration_error": "ECE"}


def show(results: list[dict[str, Any]], classes: list[str]) -> None:
    """Test accuracies in percent: one row for each seed with mean ± std, and for a single run each class."""
    table = Table("seed", *COLUMNS.values(), "epoch", "seconds", title="test, %")
    for result in results:
        figures = ["–" if result["best"][name] is None else f"{result['best'][name]:.1f}" for name in COLUMNS]
        table.add_row(str(result["config"]["seed"]), *figures, str(result["best_epoch"]), f"{result['seconds']:.0f}")
    if len(results) > 1:
        table.add_section()
        table.add_row("mean", *(mean_std([r["best"][name] for r in results]) for name in COLUMNS), "", "")
    console.print(table)
    if len(results) == 1 and len(classes) <= 20:
        per_class = Table("class", "images", "accuracy")
        for name, images, accuracy in zip(classes, results[0]["train_images"], results[0]["best"]["per_class"], strict=True):
            per_class.add_row(name, str(images), "–" if accuracy is None else f"{accuracy:.1f}")
        console.print(per_class)


def mean_std(values: list[float | None]) -> str:
    if None in values:
        return "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def finish(config: Config, data: datasets.Data) -> dict[str, Any]:
    """The run in ``config.out``: trained from the start, from where it was stopped, or read where it is finished."""
    out = config.out
    if not processes.told((out / "config.json").exists()):
        return train(config, data)
    there = read_config(out, Config())
    names = [f.name for f in dataclasses.fields(Config) if f.name not in FREE and getattr(there, f.name) != getattr(config, f.name)]
    if names:
        raise ValueError(f"out {out} holds a run of other settings ({', '.join(names)}): name another folder")
    if processes.told((out / "metrics.json").exists() and len((out / "log.jsonl").read_text().splitlines()) == config.epochs):
        return json.loads((out / "metrics.json").read_text())  # with fewer epochs they are those of --eval-only on a run that was stopped
    return train(config, data, resume=True)


def evaluate_again(config: Config, data: datasets.Data) -> dict[str, Any]:
    run = Run(config, data)
    run.load_state_dict(checkpoint.load(config.out / "last.pt", run.device))
    return report(run)


def main(given: Config) -> None:
    try:
        command(given)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error{f' on rank {processes.rank()}' if processes.count() > 1 else ''}: {error}")


def command(given: Config) -> None:
    folder = given.resume or given.eval_only
    if not (folder or given.out) and processes.restarts("MAX_RESTARTS"):
        raise ValueError("out must be named where torchrun may restart the run (--max-restarts), which must find its folder, got None")
    config = resolve(read_config(folder, given) if folder else given)
    with processes.together(processes.device(config.device)):
        console.quiet = processes.rank() > 0
        perform(given, dataclasses.replace(config, out=processes.told(config.out)))


def perform(given: Config, config: Config) -> None:
    begun = processes.told((config.out / "config.json").exists())
    if begun and not (given.resume or given.eval_only or processes.restarts("RESTART_COUNT")):
        raise ValueError(f"out {config.out} holds a run already: go on with --resume {config.out}, or name another folder")
    with processes.first_of_machine_first():
        data = datasets.load(source_of(config))
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [config if config.seeds == 1 else dataclasses.replace(config, seeds=1, seed=s, out=config.out / f"seed-{s}") for s in seeds]
    if config.seeds > 1 and not begun and processes.rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_config(config)
    results = [evaluate_again(one, data) if given.eval_only else finish(one, data) for one in runs]
    show(results, data.classes)
    console.print(f"written to {config.out}", soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
