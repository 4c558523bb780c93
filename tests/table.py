"""The losses, a row each: ours, the textbook's (naive.py), and inputs. What holds for every loss is tested and timed over this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastsupcon import BalancedSupConLoss, InfoNCELoss, NTXentLoss, PaCoLoss, PrototypeCrossEntropyLoss, PSCLoss, SupConLoss, functional
from tests import naive


@dataclass(frozen=True)
class Row:
    ours: Callable[..., Tensor]  # of the inputs, with backend= and the options
    naive: Callable[..., Tensor]  # of the inputs, with the options
    inputs: Callable[..., tuple[Tensor | None, ...]]  # (samples, depth) -> float64 or integer tensors on the CPU; the first is features
    module: Callable[..., torch.nn.Module]  # (inputs) -> the module that computes the same of the first inputs
    options: dict[str, object] = field(default_factory=dict)
    meets: str = "rows"  # whom the rows meet: each other ("rows"), as many "others", class "prototypes", or "both" rows and prototypes

    @property
    def has_prototypes(self) -> bool:
        """inputs[2] are those of the classes."""
        return self.meets in ("prototypes", "both")

    def held(self, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """What of the inputs the module is called with: prototypes are its own."""
        return inputs[:2] + inputs[3:] if self.has_prototypes else inputs

    def on(self, samples: int, depth: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The inputs, rows of unit length rounded to ``dtype``; what is floating is a leaf that requires a gradient."""
        return tuple(
            x if x is None else x.to(device, dtype).requires_grad_() if x.is_floating_point() else x.to(device)
            for x in self.inputs(samples, depth)
        )


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def labelled(samples: int, depth: int, views: int = 0):
    return unit(*((samples, views, depth) if views else (samples, depth))), torch.randint(0, max(1, samples // 4), (samples,))


def masked(samples: int, depth: int):
    return unit(samples, 3, depth), None, torch.rand(samples, samples)  # the mask's dtype is its own: no gradient is asked of it


def prototyped(samples: int, depth: int, classes: int = 7, per_class: int = 1, views: int = 0):
    features = unit(*((samples, views, depth) if views else (samples, depth)))
    return features, torch.randint(0, classes, (samples,)), unit(classes * per_class, depth)


def with_class_features(samples: int, depth: int, classes: int = 7):
    """And rows of a momentum encoder; what meets the prototypes is of a dimension of its own."""
    features, labels, prototypes = prototyped(samples, 2 * depth, classes)
    return unit(samples, depth), labels, prototypes, unit(samples, depth), features


def paired(samples: int, depth: int):
    return unit(samples, depth), unit(samples, depth)


def keyed_pairs(samples: int, depth: int):
    """Several captions of an image, and hard negatives."""
    return *paired(samples, depth), torch.randint(0, max(1, samples // 2), (samples,)), unit(samples + 3, depth)


def _scl_module(options):
    return lambda inputs, backend="auto": SupConLoss(**({"base_temperature": None} | options), backend=backend)


def _module(kind, options):
    """For a loss without a state."""
    return lambda inputs, backend="auto": kind(**options, backend=backend)


def long_tail(prototypes: Tensor) -> Tensor:
    """How many samples each of their classes has, one of them none."""
    return torch.arange(len(prototypes), device=prototypes.device) ** 2


def _prototypes_module(kind, options, counted=False):
    def build(inputs, backend="auto"):
        prototypes, more = inputs[2], {"class_counts": long_tail(inputs[2])} if counted else {}
        classes = len(prototypes) // options.get("prototypes_per_class", 1)
        module = kind(classes, prototypes.shape[1], **more, **options, backend=backend).to(inputs[0])
        module.prototypes.data.copy_(prototypes)
        return module

    return build


def _counted(loss):
    """With class counts, which are no input that a gradient is asked of."""
    return lambda features, labels, prototypes, *more, **options: loss(
        features, labels, prototypes, *more, class_counts=long_tail(prototypes), **options
    )


def _scl(inputs, **options) -> Row:
    options = {"temperature": 0.1, "normalize": True} | options
    return Row(functional.supcon_loss, naive.supcon_loss, inputs, _scl_module(options), options)


def _form(**options) -> Row:
    """Of supcon_loss's other forms."""
    options = {"temperature": 0.2, "normalize": True} | options
    return Row(functional.supcon_loss, naive.hard_negative_supcon_loss, labelled, _scl_module(options), options)


def several(samples: int, depth: int):
    return unit(samples, 2, depth), torch.rand(samples, 3) + 0.05  # a gradient is asked of them too, at 0 from one side alone


def naive_several(features, labels, **options):
    return naive.supcon_loss(features, mask=naive.several_labels(labels), **options)


def _infonce(inputs, **options) -> Row:
    options = {"temperature": 0.1} | options
    return Row(functional.info_nce_loss, naive.info_nce_loss, inputs, _module(InfoNCELoss, options), options, "others")


def _ntxent(**options) -> Row:
    options = {"temperature": 0.1} | options
    return Row(functional.nt_xent_loss, naive.nt_xent_loss, paired, _module(NTXentLoss, options), options)


def _psc(**options) -> Row:
    options = {"temperature": 0.2} | options
    inputs = partial(prototyped, per_class=options.get("prototypes_per_class", 1))
    return Row(functional.psc_loss, naive.psc_loss, inputs, _prototypes_module(PSCLoss, options), options, "prototypes")


def _prototype_ce(**options) -> Row:
    options = {"temperature": 0.1} | options
    ours, textbook = (_counted(module.prototype_cross_entropy) for module in (functional, naive))
    return Row(ours, textbook, prototyped, _prototypes_module(PrototypeCrossEntropyLoss, options, counted=True), options, "prototypes")


def _balanced(**options) -> Row:
    options = {"temperature": 0.1} | options
    module = _prototypes_module(BalancedSupConLoss, options)
    return Row(functional.balanced_supcon_loss, naive.balanced_supcon_loss, partial(prototyped, views=2), module, options, "both")


def _paco(**options) -> Row:
    options = {"temperature": 0.2} | options
    ours, textbook = (_counted(module.paco_loss) for module in (functional, naive))
    return Row(ours, textbook, with_class_features, _prototypes_module(PaCoLoss, options, counted=True), options, "both")


SEVERAL = {"temperature": 0.1, "normalize": True}

LOSSES = {
    "scl": _scl(labelled),
    "scl raw rows": _scl(partial(labelled, views=2), normalize=False, base_temperature=0.07),
    "scl one": _scl(partial(labelled, views=2), contrast_mode="one", lone_anchors="skip"),
    "simclr": _scl(lambda samples, depth: (unit(samples, 2, depth), None)),
    "scl mask": _scl(masked),
    "scl in": _form(form="in"),
    "dcl": _form(denominator="negatives", lone_anchors="skip"),
    "scl hard": _form(beta=0.7),
    "dcl hard in": _form(beta=1.5, denominator="negatives", form="in"),
    "scl ignore": _form(ignore_index=0),
    "scl several": Row(functional.supcon_loss, naive_several, several, _scl_module(SEVERAL), SEVERAL),
    "psc": _psc(),
    "psc all": _psc(denominator="all", normalize=False),
    "mpsc": _psc(prototypes_per_class=3),
    "bcl": _balanced(),
    "paco": _paco(alpha=0.3, beta=0.8, gamma=0.6, class_temperature=0.7, label_smoothing=0.1),
    "margins": _prototype_ce(margin=0.2, angular_margin=0.3),
    "infonce": _infonce(paired),
    "infonce rows": _infonce(paired, symmetric=False, normalize=False),
    "infonce keys": _infonce(keyed_pairs),
    "ntxent": _ntxent(),
}
