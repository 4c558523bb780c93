"""The methods: what the feature branch and the classifier branch minimise, on which images, with which weights. One entry each.

A loss of your own is an entry of FEATURE_LOSSES or CLASSIFIER_LOSSES, a method of your own an entry of METHODS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from sampling import Rule
from schedule import branch_weights, switch_epoch
from torch import Tensor, nn

from fastsupcon import MemoryQueue, PSCLoss, SupConLoss
from fastsupcon import functional as losses


@dataclass(frozen=True)
class Method:
    # ce, ce-balanced, focal, cb-focal, ldam-drw, logit-adjustment, crt, tau-norm, two-stage, hybrid-sc, hybrid-psc, hybrid-mpsc, bcl, paco,
    # gpaco, kcl, ours: of docs/methods.md; the settings below have its values as defaults
    method: str = "hybrid-sc"
    feature_loss: str = "sc"  # of the feature branch: none, sc, sc-one-view, psc, mpsc, bcl, paco, gpaco, kcl
    classifier_loss: str = "ce"  # of the classifier branch: ce, focal, ldam; none where the feature loss trains the classifier
    # of alpha: parabolic-decay, linear, cosine, constant, parabolic-increment, beta, switch, two-stage, sum
    schedule: str = "parabolic-decay"
    switch_at: float = 0.5  # fraction of the epochs at which "switch" and "two-stage" go from features to classifier
    loss_weights: tuple[float, float] = (1.0, 1.0)  # of the feature loss and the classifier's, beside the schedule's
    feature_sampler: Rule = "instance"  # of the feature branch; of the first of two stages
    sampler: Rule = "class-balanced"  # of the classifier branch
    most_shown: int = 50  # of sampler "budgeted": how often an image of the rarest class is at most drawn in all of training
    classifier_images: Literal["own", "shared", "views"] = "own"  # of its own sampler; the feature branch's, anew; its very views

    temperature: float = 0.1  # of the feature loss
    prototypes_per_class: int = 4  # of mpsc
    denominator: Literal["negatives", "all"] = "negatives"  # of psc and mpsc: "all" puts the own prototypes back
    positives: int = 6  # of kcl: of each anchor, beside its other view
    positive_weight: float = 0.05  # alpha of paco and gpaco: of each positive row, beside the prototype's 1
    momentum_encoder: float = 0.999  # of paco: decay of the encoder of its keys
    queue: int = 1024  # of paco and gpaco: rows of earlier batches, paco's from its momentum encoder, gpaco's the second views

    logit_adjustment: float = 0.0  # this x log(class prior) is added to the logits in training: 0 is CE, 1 balanced softmax
    focal_gamma: float = 1.0  # of focal
    margin: float = 0.5  # of ldam: the rarest class's
    cosine: float = 0.0  # the scale of a classifier of unit features and unit weights; 0: a linear one
    class_weights: float = 0.0  # beta of the effective numbers of samples, by which classes are weighted; 0: all alike
    reweight_from: float = 0.0  # fraction of the epochs from which class_weights act
    weighted_mean: Literal["weights", "images"] = "weights"  # that divide the sum weighted by class_weights
    tau_normalisation: float = 0.0  # evaluated with class weights w / |w|^tau
    mixup: float = 0.0  # of the classifier's images: both parameters of the Beta distribution


# ---- the feature branch


class Branch(NamedTuple):
    """What a feature loss is given. Rows go view by view: V views of B images."""

    z: Tensor  # [V B, E] of the projection head, of any length
    labels: Tensor  # [V B]
    features: Tensor  # [V B, F] of the backbone
    keys: Tensor | None  # [K B, E] of the momentum encoder, of the same images
    classifier: nn.Linear  # weight [C, F], bias [C]


class Setup(NamedTuple):
    """What a loss is made for."""

    method: Method
    counts: Tensor  # training images of each class
    prior: Tensor  # [C] how often the classifier is shown each class, summing to 1
    features: int  # F, the backbone's
    embedding: int  # E, the head's
    batch: int  # B, of all processes
    options: dict[str, Any]  # backend and group of fastsupcon's losses

    @property
    def classes(self) -> int:
        return len(self.counts)


class OnEmbeddings(nn.Module):
    """A loss of embeddings and labels, as most are."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, branch: Branch) -> Tensor:
        return self.loss(branch.z, branch.labels)


def _supcon(setup: Setup) -> nn.Module:
    options = {"base_temperature": None, "normalize": True, **setup.options}  # as published, where the default is the common 0.07
    return OnEmbeddings(SupConLoss(setup.method.temperature, **options))


def _psc(setup: Setup) -> nn.Module:
    method = setup.method
    per_class = method.prototypes_per_class if method.feature_loss == "mpsc" else 1
    options = {"prototypes_per_class": per_class, "denominator": method.denominator, **setup.options}
    return OnEmbeddings(PSCLoss(setup.classes, setup.embedding, method.temperature, **options))


def _psc_chance(setup: Setup) -> float:
    per_class = setup.method.prototypes_per_class if setup.method.feature_loss == "mpsc" else 1
    return math.log((setup.classes - (setup.method.denominator == "negatives")) * per_class)


class Balanced(nn.Module):
    """BCL: a class's prototype is a projection of the classifier's weights for it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        wide = setup.features
        self.project = nn.Sequential(nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, setup.embedding))
        self.options = {"temperature": setup.method.temperature, **setup.options}

    def forward(self, branch: Branch) -> Tensor:
        return losses.balanced_supcon_loss(branch.z, branch.labels, self.project(branch.classifier.weight), **self.options)


class Parametric(nn.Module):
    """PaCo and GPaCo: the classifier's weights are the prototypes, its bias a further column of them where the features hold a 1."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        method = setup.method
        self.register_buffer("counts", setup.counts.clone())
        self.views = FEATURE_LOSSES[method.feature_loss].views
        self.queue = MemoryQueue(method.queue, setup.embedding)
        self.options = {"alpha": method.positive_weight, "temperature": method.temperature, **setup.options}

    def forward(self, branch: Branch) -> Tensor:
        prototypes = torch.cat([branch.classifier.weight, branch.classifier.bias[:, None]], 1)
        z, features = (x.unflatten(0, (self.views, -1)).transpose(0, 1) for x in (branch.z, F.pad(branch.features, (0, 1), value=1.0)))
        given = {"momentum_features": branch.keys, "class_features": features, "class_counts": self.counts, "queue": self.queue}
        return losses.paco_loss(z, branch.labels[: len(z)], prototypes.to(features.dtype), **given, **self.options)


class KPositives(nn.Module):
    """KCL: an anchor's positives are its other view and at most K of the other images' rows of its class, drawn anew at each step.

    The batch is shuffled, each class stands in a circle, and of those that follow an anchor the first K are taken: O(N K) memory.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        if setup.options["group"] is not None:
            raise ValueError("feature_loss 'kcl' names positives by number and serves one process, got several")
        self.positives, self.images = setup.method.positives, setup.batch
        self.options = {"temperature": setup.method.temperature, "backend": setup.options["backend"]}

    def draw(self, labels: Tensor) -> Tensor:
        """[N, 2 + K] numbers of rows, the other view's first, -1 for none. Rows go view by view: i and i + B are of one image."""
        count, device = len(labels), labels.device
        shuffled = torch.randperm(count, device=device)
        order = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
        ordered, place = labels[order], torch.arange(count, device=device)
        start = torch.searchsorted(ordered, ordered)
        size = torch.searchsorted(ordered, ordered, right=True) - start
        step = torch.arange(1, self.positives + 2, device=device)  # one more than K: the other view may be among them
        following = order[start[:, None] + (place - start)[:, None].add(step) % size[:, None]]
        free = (step < size[:, None]) & (following % self.images != order[:, None] % self.images)
        chosen = torch.where(free & (free.cumsum(1) <= self.positives), following, -1)
        chosen = torch.cat([(order[:, None] + self.images) % count, chosen], 1)
        return torch.empty_like(chosen).index_copy_(0, order, chosen)

    def forward(self, branch: Branch) -> Tensor:
        return losses.supcon_loss(branch.z, positives=self.draw(branch.labels), normalize=True, **self.options)


@dataclass(frozen=True)
class FeatureLoss:
    build: Callable[[Setup], nn.Module]  # called with a Branch
    views: int  # of each image, augmented by themselves
    source: str
    chance: Callable[[Setup], float] | None = None  # its value where all similarities are equal
    keys: int = 0  # views of a momentum encoder beside them
    trains_classifier: bool = False  # its gradient reaches the classifier's weights


def _supcon_chance(setup: Setup) -> float:
    return math.log(2 * setup.batch - 1)


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "none": FeatureLoss(lambda setup: nn.Identity(), views=0, source="no feature branch"),
    "sc": FeatureLoss(_supcon, views=2, source="Khosla et al. 2020, eq. 2", chance=_supcon_chance),
    # An image that is alone of its class in the batch has no positive and counts as 0, so chance depends on the batch.
    "sc-one-view": FeatureLoss(_supcon, views=1, source="Khosla et al. 2020, eq. 2, positives of other images alone"),
    "psc": FeatureLoss(_psc, views=1, source="Wang et al. 2021", chance=_psc_chance),
    "mpsc": FeatureLoss(_psc, views=1, source="Wang et al. 2021, several prototypes a class", chance=_psc_chance),
    "bcl": FeatureLoss(Balanced, 2, "Zhu et al. 2022", chance=lambda setup: math.log(setup.classes), trains_classifier=True),
    "paco": FeatureLoss(Parametric, views=1, keys=1, source="Cui et al. 2021", trains_classifier=True),
    "gpaco": FeatureLoss(Parametric, views=2, source="Cui et al. 2023", trains_classifier=True),
    "kcl": FeatureLoss(KPositives, views=2, source="Kang et al. 2021", chance=_supcon_chance),
}


# ---- the classifier branch: modules of logits [N, C] and labels [N] that give each image's loss [N]


class AdjustedCrossEntropy(nn.Module):
    """Cross-entropy of logits + t log(class prior): Menon et al. 2021; with t = 1 balanced softmax (Ren et al. 2020).

    The prior is the sampler's: batches that are balanced already need no other balance.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.register_buffer("shift", (setup.method.logit_adjustment * setup.prior.log()).float(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits + self.shift, labels, reduction="none")


class Focal(nn.Module):
    """(1 - p)^gamma times the cross-entropy -log p: Lin et al. 2017."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.gamma = setup.method.focal_gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction="none")
        wrong = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)  # of 0 a power below 1 has no gradient
        return wrong.pow(self.gamma) * loss


class LabelAwareMargin(nn.Module):
    """Cross-entropy of a cosine classifier whose own class is held back by a margin ~ n_c^(-1/4): LDAM, Cao et al. 2019."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        margins = setup.counts.double().pow(-0.25)
        margins = setup.method.margin * setup.method.cosine * margins / margins.max()
        self.register_buffer("margins", margins.float(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = F.one_hot(labels, logits.shape[1]) * self.margins[labels, None]
        return F.cross_entropy(logits - own, labels, reduction="none")


CLASSIFIER_LOSSES: dict[str, Callable[[Setup], nn.Module]] = {
    "ce": AdjustedCrossEntropy,
    "focal": Focal,
    "ldam": LabelAwareMargin,
    "none": lambda setup: nn.Identity(),
}


def class_weights(beta: float, counts: Tensor) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), summing to C: the inverse of the effective number of samples (Cui et al. 2019)."""
    weights = (1 - beta) / -torch.expm1(counts.double() * math.log(beta)) if beta else torch.ones(len(counts), dtype=torch.float64)
    return (weights * len(counts) / weights.sum()).float()


# ---- the methods


@dataclass(frozen=True)
class Entry:
    method: Method
    source: str
    paper: dict[str, Any] = field(default_factory=dict)  # settings of the authors' code on CIFAR, where it has them: see docs/methods.md


ALONE = {"feature_loss": "none", "schedule": "sum"}
STRONG = {"augment": "autoaugment", "feature_augment": "sim"}
PLAIN = dict.fromkeys(("augment", "feature_augment"), "cifar-plain")
LDAM_SETTINGS = {"batch": 128, "lr": 0.1, "weight_decay": 2e-4, "warmup": 0.025, "milestones": (0.8, 0.9), "lr_factor": 0.01, **PLAIN}
LOGIT_SETTINGS = {
    **{"epochs": 1241, "batch": 128, "lr": 0.1, "nesterov": True, "weight_decay": 2e-4},  # its l2 of 1e-4 |w|^2 is 2e-4 here
    **{"warmup": 20 / 1241, "milestones": (604 / 1241, 926 / 1241, 1128 / 1241), **PLAIN},
}
BCL_SETTINGS = {"batch": 256, "lr": 0.15, "weight_decay": 5e-4, "warmup": 0.025, "milestones": (0.8, 0.9), "hidden": 512, **STRONG}
PACO_SETTINGS = {
    **{"epochs": 400, "batch": 128, "lr": 0.05, "weight_decay": 5e-4, "warmup": 0.025, "milestones": (0.8, 0.9)},
    **{"hidden": 64, "embedding": 32, **dict.fromkeys(("augment", "feature_augment"), "autoaugment")},
}
# Of Li et al. 2022 (TSC): 1000 epochs of features, then 200 of a classifier with LDAM's loss.
KCL_SETTINGS = {
    **{"epochs": 1200, "switch_at": 5 / 6, "batch": 1024, "lr": 0.5, "warmup": 0.01, "milestones": (), "weight_decay": 1e-4},
    **{"classifier_loss": "ldam", "cosine": 30.0, "class_weights": 0.9999, "sampler": "instance"},
    **dict.fromkeys(("augment", "feature_augment"), "sim"),
}

METHODS: dict[str, Entry] = {
    "ce": Entry(Method(**ALONE, sampler="instance"), "cross-entropy", LDAM_SETTINGS),
    "ce-balanced": Entry(Method(**ALONE), "cross-entropy, class-balanced batches", LDAM_SETTINGS),
    "focal": Entry(Method(**ALONE, sampler="instance", classifier_loss="focal"), "Lin et al. 2017", LDAM_SETTINGS),
    "cb-focal": Entry(
        Method(**ALONE, sampler="instance", classifier_loss="focal", class_weights=0.9999, weighted_mean="images"),
        "Cui et al. 2019",
        LDAM_SETTINGS,
    ),
    "ldam-drw": Entry(
        Method(**ALONE, sampler="instance", classifier_loss="ldam", cosine=30.0, class_weights=0.9999, reweight_from=0.8),
        "Cao et al. 2019",
        LDAM_SETTINGS,
    ),
    "logit-adjustment": Entry(
        Method(**ALONE, sampler="instance", logit_adjustment=1.0), "Menon et al. 2021; Ren et al. 2020", LOGIT_SETTINGS
    ),
    "crt": Entry(
        Method(feature_loss="none", schedule="two-stage", switch_at=0.95),
        "Kang et al. 2020, classifier trained again",
        LDAM_SETTINGS | {"epochs": 230, "switch_at": 200 / 230},  # Zhang et al. 2021: theirs has no CIFAR
    ),
    "tau-norm": Entry(Method(**ALONE, sampler="instance", tau_normalisation=1.0), "Kang et al. 2020, tau-normalisation", LDAM_SETTINGS),
    "two-stage": Entry(Method(schedule="two-stage", switch_at=2 / 3), "Khosla et al. 2020, features, then a classifier", KCL_SETTINGS),
    "hybrid-sc": Entry(Method(), "Wang et al. 2021"),
    "hybrid-psc": Entry(Method(feature_loss="psc"), "Wang et al. 2021"),
    "hybrid-mpsc": Entry(Method(feature_loss="mpsc"), "Wang et al. 2021, several prototypes a class"),
    "bcl": Entry(
        Method(
            feature_loss="bcl",
            schedule="sum",
            loss_weights=(0.6, 2.0),
            sampler="instance",
            classifier_images="shared",
            logit_adjustment=1.0,
        ),
        "Zhu et al. 2022",
        BCL_SETTINGS,
    ),
    "paco": Entry(
        Method(feature_loss="paco", classifier_loss="none", schedule="sum", temperature=0.05, positive_weight=0.01),
        "Cui et al. 2021",
        PACO_SETTINGS,
    ),
    "gpaco": Entry(
        Method(feature_loss="gpaco", classifier_loss="none", schedule="sum", temperature=0.07, positive_weight=0.01),
        "Cui et al. 2023",
        PACO_SETTINGS | {"embedding": 128},
    ),
    "kcl": Entry(Method(feature_loss="kcl", schedule="two-stage", switch_at=0.8, temperature=0.07), "Kang et al. 2021", KCL_SETTINGS),
    "ours": Entry(
        Method(
            feature_loss="sc-one-view",
            schedule="sum",
            loss_weights=(0.5, 1.0),
            temperature=0.2,
            feature_sampler="budgeted",
            sampler="budgeted",
            classifier_images="views",
            logit_adjustment=1.0,
        ),
        "of this repository: SupCon and a logit-adjusted classifier on the same images, each taken once",
    ),
}


@dataclass(frozen=True)
class Stage:
    """What an epoch trains."""

    alpha: float  # the schedule's weight of the feature branch
    weights: tuple[float, float]  # of the feature loss and the classifier's
    epochs: tuple[int, int]  # first and last + 1 of this stage, which has its own course of lr
    views: int  # of the feature branch that are anchors; 0: no feature branch
    keys: int  # and those of the momentum encoder
    classifies: bool
    sampler: str  # of the classifier's images
    own_images: bool  # the classifier has images beside the feature branch's views
    frozen: bool  # everything below the classifier
    reweighted: bool  # the classifier's classes


def stage_at(method: Method, epoch: int, epochs: int, seed: int = 0) -> Stage:
    feature = FEATURE_LOSSES[method.feature_loss]
    alpha, beta = branch_weights(method.schedule, epoch, epochs, switch_at=method.switch_at, seed=seed)
    switch = switch_epoch(method.switch_at, epochs) if method.schedule == "two-stage" else epochs
    second, alone = method.schedule == "two-stage" and epoch >= switch, method.feature_loss == "none"
    weights = (0.0, 1.0) if alone else (alpha * method.loss_weights[0], beta * method.loss_weights[1])
    classifies = method.classifier_loss != "none" and (method.schedule != "two-stage" or second or alone)
    return Stage(
        alpha=0.0 if alone else alpha,
        weights=weights,
        epochs=(switch, epochs) if second else (0, switch),
        views=0 if second else feature.views,
        keys=0 if second else feature.keys,
        classifies=classifies,
        sampler="feature" if alone and method.schedule == "two-stage" and not second else "classifier",
        own_images=classifies and method.classifier_images != "views",
        frozen=second,
        reweighted=epoch / epochs >= method.reweight_from,
    )


def passes(method: Method, classifier: float = 1.0) -> float:
    """How often an epoch takes an image through the backbone, the mean over training: in each view, as a key, for the classifier.

    ``classifier`` is classifier_batch / batch; where there is no feature branch, the classifier's pass is the epoch.
    """
    stages, own = [stage_at(method, epoch, 1000) for epoch in range(1000)], classifier if FEATURE_LOSSES[method.feature_loss].views else 1.0
    return sum(stage.views + stage.keys + own * stage.own_images for stage in stages) / len(stages)
