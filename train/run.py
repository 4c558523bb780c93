"""A network in training: what an epoch trains on, one step of it, and everything that a checkpoint holds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checkpoint
import data as datasets
import evaluate
import processes
import torch
from augment import Draws, mixup
from methods import CLASSIFIER_LOSSES, FEATURE_LOSSES, Branch, Setup, Stage, class_weights, stage_at
from networks import DTYPES, HybridNetwork, freeze_below_classifier, load_weights, make_backbone
from sampling import Sampler
from schedule import learning_rate
from settings import Config
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """The indices of an epoch's images: a row a step. Columns: the feature branch's views, the keys' views, the classifier's images."""

    indices: Tensor  # [steps, columns], of all processes
    own: Tensor  # the columns that this process has
    parts: tuple[int, int, int]  # how many of them are of each kind
    draws: dict[str, Draws]  # of the augmentation, of all columns or of each branch's, and of the mixing of the classifier's


class AsTheyAre:
    """In place of an augmentation, for data that are features."""

    def train(self, features: Tensor, _draws: Draws) -> Tensor:
        return features.float()

    def evaluate(self, features: Tensor) -> Tensor:
        return features.float()


class Run:
    """Processes share the steps, and all hold the same."""

    def __init__(self, config: Config, data: datasets.Data, stopped: Callable[[], object] = lambda: False) -> None:
        machine, optimiser, method = config.machine, config.optimiser, config.method
        self.config, self.data, self.device = config, data, processes.device(machine.device)
        self.classes = len(data.classes)
        self.batch = optimiser.batch
        self.classifier_batch = optimiser.batch if optimiser.classifier_batch is None else optimiser.classifier_batch
        for name, images in (("batch", self.batch), ("classifier_batch", self.classifier_batch)):
            if images < processes.count():
                raise ValueError(f"{name} must be at least the number of processes, {processes.count()}, got {images}")
        torch.manual_seed(config.records.seed)
        pictures = not isinstance(data.train.images, Tensor) or data.train.images.ndim == 4
        self.layout = torch.channels_last if machine.channels_last and pictures else torch.contiguous_format
        sizes = config.network
        side = data.train.images.shape[-1] if isinstance(data.train.images, Tensor) else config.images.image_size
        options = {"pretrained": sizes.pretrained, "image_size": side, "dropout": sizes.dropout}
        backbone = make_backbone(sizes.network, data.train.channels, sizes.width, **options)
        if not pictures:
            backbone.measure(data.train.images)
        how = {"feature": config.feature_augment, "classifier": config.augment}
        self.augments = how if pictures else dict.fromkeys(how, AsTheyAre())
        network = HybridNetwork(backbone, self.classes, sizes.hidden, sizes.embedding, method.cosine)
        if sizes.weights is not None:
            load_weights(network, sizes.weights)
        network = processes.share_batch_statistics(network, self.device)
        self.network = network.to(self.device, memory_format=self.layout)
        self.forward = torch.compile(self.network) if machine.compile else self.network
        self.feature = FEATURE_LOSSES[method.feature_loss]
        options = {"backend": machine.backend, "group": processes.group()}
        self.steps = max(1, len(data.train) // (self.batch if self.feature.views else self.classifier_batch))
        seed, total = 2 * config.records.seed, self.steps * optimiser.epochs
        self.samplers = {
            "feature": Sampler(data.train.labels, method.feature_sampler, seed, total * self.batch, method.most_shown),
            "classifier": Sampler(data.train.labels, method.sampler, seed + 1, total * self.classifier_batch, method.most_shown),
        }
        prior = self.samplers["classifier"].prior
        self.setup = Setup(method, data.counts, prior, backbone.num_features, sizes.embedding, self.batch, options)
        self.feature_loss = self.feature.build(self.setup).to(self.device)
        self.class_weights = class_weights(method.class_weights, data.counts).to(self.device) if method.class_weights else None
        self.parameters = [*self.network.parameters(), *self.feature_loss.parameters()]
        # A tensor, as are the weights: a new value is written, nothing compiled or waited for.
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = make_optimizer(config, self.parameters, self.lr)
        self.autocast = torch.autocast(self.device.type, DTYPES[machine.precision], enabled=machine.precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=machine.precision == "fp16")
        self.ema = None if optimiser.ema is None else average_of(self.network, optimiser.ema, use_buffers=True)
        self.momentum = average_of(self.network, method.momentum_encoder) if self.feature.keys else None

        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        self.batches = {
            name: datasets.Batches(split, self.device, config.images.image_size, config.images.workers, stopped)
            for name, split in parts.items()
            if split
        }

        self.epoch, self.step, self.lr_now = 0, 0, 0.0  # step: inside the epoch
        self.weights = torch.zeros(2, device=self.device)
        # Feature loss, classifier loss and share right, of this epoch. Each process has its part; what is meant is the sum over them.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.used: list[nn.Module] = []
        self.stage: Stage | None = None
        self.history: list[dict[str, Any]] = []
        self.best = {"epoch": optimiser.epochs - 1, "balanced": -1.0}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """What this epoch trains, and the images it trains on."""
        config = self.config
        self.drawn_from = {name: sampler.state_dict() for name, sampler in self.samplers.items()}
        before, self.stage = self.stage, stage_at(config.method, self.epoch, config.optimiser.epochs, config.records.seed)
        stage = self.stage
        if before is None or stage.sampler != before.sampler:
            setup = self.setup._replace(prior=self.samplers[stage.sampler].prior)
            self.classifier_loss = CLASSIFIER_LOSSES[config.method.classifier_loss](setup).to(self.device)
        self.weights.copy_(torch.tensor(stage.weights))
        self.network.train()
        if stage.frozen:
            freeze_below_classifier(self.network)
        self.plan = self.draw()
        used = [self.network.backbone] if not stage.frozen else []
        used += [self.network.head, self.feature_loss] if stage.views else []
        used += [self.network.classifier] if stage.classifies or self.feature.trains_classifier else []
        if used != self.used:  # at the start, and where the second of two stages begins
            self.used, parameters = used, [p for module in used for p in module.parameters() if p.requires_grad]
            self.averaged_losses = processes.averaging(self.losses, parameters)

    def draw(self) -> Plan:
        stage, images_of = self.stage, self.config.method.classifier_images
        views = stage.views + stage.keys
        feature = self.samplers["feature"].draw(self.steps * self.batch).view(self.steps, -1) if views else None
        parts = [] if feature is None else [feature.repeat(1, views)]
        if stage.own_images:
            shared = images_of == "shared"
            parts.append(feature if shared else self.samplers[stage.sampler].draw(self.steps * self.classifier_batch).view(self.steps, -1))
        sizes = [self.batch] * views + [self.classifier_batch] * stage.own_images
        starts = list(itertools.accumulate(sizes, initial=0))
        own = [torch.tensor(processes.part(size)) + start for size, start in zip(sizes, starts, strict=False)]
        counts = [len(part) for part in own]
        of_features = starts[views]

        def draws(columns: list[Tensor], first: int, last: int) -> Draws:
            kept = None if processes.count() == 1 else (torch.cat(columns) - first).to(self.device)
            return Draws(last - first, self.device, kept)

        augmented = {}
        if self.config.augment == self.config.feature_augment:
            augmented["all"] = draws(own, 0, starts[-1])
        else:
            augmented |= {"feature": draws(own[:views], 0, of_features)} if views else {}
            augmented |= {"classifier": draws(own[views:], of_features, starts[-1])} if stage.own_images else {}
        if stage.own_images and self.config.method.mixup:
            augmented["mixup"] = draws(own[views:], of_features, starts[-1])
        rows = sum(counts[: stage.views]), sum(counts[stage.views : views]), sum(counts[views:])
        return Plan(torch.cat(parts, 1), torch.cat(own), rows, augmented)

    def augmented(self, raw: Tensor) -> Tensor:
        draws, parts = self.plan.draws, self.plan.parts
        if "all" in draws:
            images = self.augments["classifier"].train(raw, draws["all"])
        else:
            split = parts[0] + parts[1]
            pieces = {"feature": raw[:split], "classifier": raw[split:]}
            images = torch.cat([self.augments[name].train(part, draws[name]) for name, part in pieces.items() if name in draws])
        return images.contiguous(memory_format=self.layout)

    def losses(self, images: Tensor, labels: Tensor, keys: Tensor | None, mixed: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What is minimised, whose gradient is the mean over the processes; and this process's part of ``sums``."""
        stage, count, nothing = self.stage, processes.count(), self.weights.new_zeros(())
        anchors, _, own = self.plan.parts
        first = anchors if own else 0
        z, logits, features = self.forward(images, anchors, first)
        feature_loss = classifier_loss = right = nothing
        if stage.views:  # the same on every process
            feature_loss = self.feature_loss(Branch(z, labels[:anchors], features[:anchors], keys, self.network.classifier))
        if stage.classifies:
            logits, classes = logits.float(), labels[first:]
            total = images_of_all = self.classifier_batch if own else stage.views * self.batch
            reweighted = self.class_weights is not None and stage.reweighted

            def loss_of(classes: Tensor) -> Tensor:
                each = self.classifier_loss(logits, classes)
                return each * self.class_weights[classes] if reweighted else each

            each = loss_of(classes)
            if mixed is not None:  # the partners are the same images in another order, and so are their weights
                partner, share = mixed
                each = share * each + (1 - share) * loss_of(classes[partner])
            if reweighted and self.config.method.weighted_mean == "weights":
                total = processes.total(self.class_weights[classes].sum())
            classifier_loss = each.sum() / total
            right = (logits.argmax(1) == classes).sum() / images_of_all
        loss = self.weights[0] * feature_loss + self.weights[1] * (count * classifier_loss)
        return loss, torch.stack([feature_loss.detach() / count, classifier_loss.detach(), right])

    def update(self, raw: Tensor, labels: Tensor) -> None:
        """One step: the images of both branches through the backbone as one batch."""
        optimiser, (first, last) = self.config.optimiser, self.stage.epochs
        done, total = (self.epoch - first) * self.steps + self.step, (last - first) * self.steps
        self.lr_now = learning_rate(
            optimiser.lr, done, total, warmup=optimiser.warmup, milestones=optimiser.milestones, factor=optimiser.lr_factor
        )
        self.lr.fill_(self.lr_now)
        images, keys, mixed = self.augmented(raw), None, None
        anchors, of_keys, own = self.plan.parts
        with self.autocast:
            if of_keys:
                with torch.no_grad():
                    keys = self.momentum.module(images[anchors : anchors + of_keys], of_keys, of_keys)[0]
                images, labels = (torch.cat([x[:anchors], x[anchors + of_keys :]]) for x in (images, labels))
            if self.config.method.mixup and own:
                blended, *mixed = mixup(images[anchors:], self.config.method.mixup, self.plan.draws["mixup"])
                images = torch.cat([images[:anchors], blended]).contiguous(memory_format=self.layout)
            loss, measured = self.averaged_losses(images, labels, keys, mixed)
        self.scaler.scale(loss).backward()
        if optimiser.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, optimiser.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for average in (self.ema, self.momentum):
            if average is not None:
                average.update_parameters(self.network)
        self.sums += measured
        self.step += 1

    def means(self) -> dict[str, float | None]:
        """Of the epoch so far, over all processes, each of which must ask. Waits for the device."""
        feature, classifier, right = (processes.total(self.sums) / self.step).tolist()
        stage = self.stage
        return {
            "alpha": stage.alpha if self.feature.views else None,
            "lr": self.lr_now,
            "feature_loss": feature if stage.views else None,
            "chance": self.chance if stage.views else None,
            "classifier_loss": classifier if stage.classifies else None,
            "train_accuracy": 100 * right if stage.classifies else None,
        }

    @property
    def chance(self) -> float | None:
        """The feature loss where all similarities are equal: log of the number of terms in its denominator."""
        return None if self.feature.chance is None else self.feature.chance(self.setup)

    def end_epoch(self) -> None:
        before = self.stage
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        self.begin_epoch()
        if self.stage.frozen and not before.frozen and before.classifies:
            self.begin_classifier()

    def begin_classifier(self) -> None:
        """cRT: a classifier anew, on features that stay; its course so far is neither in its momentum nor in its average."""
        self.network.classifier.reset_parameters()
        for p in self.network.classifier.parameters():
            for value in self.optimizer.state[p].values():
                value.zero_()
        if self.ema is not None:
            self.ema.module.classifier.load_state_dict(self.network.classifier.state_dict())

    @property
    def averaged(self) -> HybridNetwork:
        """The network, or its running average."""
        return self.network if self.ema is None else self.ema.module

    @property
    def evaluated(self) -> HybridNetwork:
        """A copy where the classifier is tau-normalised: what is loaded belongs in ``averaged``."""
        tau = self.config.method.tau_normalisation
        if not tau:
            return self.averaged
        network = copy.deepcopy(self.averaged)
        with torch.no_grad():
            network.classifier.weight.copy_(evaluate.tau_normalised(network.classifier.weight, tau))
            network.classifier.bias.zero_()
        return network

    def predict(self, part: str, *outputs: str) -> tuple[Tensor, ...]:
        """Of a split: the named outputs (see :func:`evaluate.predict`), then the labels."""
        size = self.config.records.eval_batch or len(self.plan.own)
        predicted = evaluate.predict(self.evaluated, self.batches[part], self.augments["classifier"], self.autocast, size, outputs)
        self.network.train()
        if self.stage.frozen:
            freeze_below_classifier(self.network)
        return predicted

    def _modules(self) -> dict[str, Any]:
        modules = {"network": self.network, "feature_loss": self.feature_loss, "optimizer": self.optimizer, "scaler": self.scaler}
        return modules | {name: module for name in ("ema", "momentum") if (module := getattr(self, name)) is not None}

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
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        for name, sampler in self.samplers.items():
            sampler.load_state_dict({key: value.cpu() for key, value in state["samplers"][name].items()})
        for name in ("epoch", "step", "lr_now", "history", "best"):
            setattr(self, name, state[name])
        self.sums = state["sums"] if processes.rank() == 0 else torch.zeros_like(self.sums)
        self.begin_epoch()
        checkpoint.set_random_state(state["random"], self.device)


def average_of(network: nn.Module, decay: float, *, use_buffers: bool = False) -> torch.optim.swa_utils.AveragedModel:
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    return torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average, use_buffers=use_buffers)


def make_optimizer(config: Config, parameters: list[nn.Parameter], lr: Tensor) -> torch.optim.Optimizer:
    chosen = config.optimiser
    if chosen.optimiser == "adamw":
        betas = (chosen.momentum, 0.999)
        # Biases and the gains of norms are left alone, as wherever transformers are trained: to pull these to 0 is to shut a layer.
        groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=chosen.weight_decay, fused=True)
    options = {"momentum": chosen.momentum, "nesterov": chosen.nesterov, "weight_decay": chosen.weight_decay}
    optimizer = torch.optim.SGD(parameters, lr=lr, fused=True, **options)
    for p in parameters:  # or a first step that fp16 skips would leave torch's fused SGD with buffers it never filled
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer
