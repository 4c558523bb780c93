"""What users write, as a type checker sees it: mypy reads this file in tests/test_typed.py. An ignored error is one that it must find."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastsupcon
from fastsupcon import BalancedSupConLoss, InfoNCELoss, MemoryQueue, NTXentLoss, PaCoLoss, PrototypeCrossEntropyLoss, PSCLoss, SupConLoss
from fastsupcon import functional as F
from fastsupcon.integrations.lightly import NTXentLoss as LightlyNTXentLoss
from fastsupcon.integrations.open_clip import ClipLoss
from fastsupcon.options import Denominator, Reduction

features, labels = torch.randn(8, 16), torch.arange(8)

# A loss takes what its forward takes, and is a tensor: nn.Module's own call takes and gives anything.
loss: Tensor = SupConLoss(0.1)(features, labels)
assert_type(SupConLoss(0.1)(features, labels=labels), Tensor)
assert_type(InfoNCELoss(symmetric=False)(features, features, negatives=features), Tensor)
assert_type(NTXentLoss(0.2, queue=MemoryQueue(64, 16))(features, features), Tensor)
assert_type(PSCLoss(8, 16)(features, labels), Tensor)
assert_type(BalancedSupConLoss(8, 16)(features, labels), Tensor)
assert_type(PaCoLoss(8, 16, class_counts=[1.0] * 8)(features, labels, class_features=features), Tensor)
assert_type(PrototypeCrossEntropyLoss(8, 16, margin=0.2)(features, labels), Tensor)
assert_type(LightlyNTXentLoss()(features, features), Tensor)
SupConLoss(0.1)(features, label=labels)  # type: ignore[call-arg]
SupConLoss(0.1)(features, [0, 1])  # type: ignore[arg-type]
NTXentLoss()(features)  # type: ignore[call-arg]
SupConLoss(tau=0.1)  # type: ignore[call-arg]
InfoNCELoss(reduction=None)  # type: ignore[arg-type]

# An option that has names takes these and no others; where the name comes from elsewhere, its type says so.
SupConLoss(contrast_mode="some")  # type: ignore[arg-type]
SupConLoss(form="outer")  # type: ignore[arg-type]
SupConLoss(denominator="positives")  # type: ignore[arg-type]
SupConLoss(lone_anchors="drop")  # type: ignore[arg-type]
NTXentLoss(reduction="avg")  # type: ignore[arg-type]
NTXentLoss(across="star")  # type: ignore[arg-type]
PSCLoss(8, 16, backend="tritn")  # type: ignore[arg-type]
F.supcon_loss(features, labels, reduction="avg")  # type: ignore[arg-type]
F.self_logsumexp(features, backend="tritn")  # type: ignore[arg-type]
named_elsewhere: str = "sum"
SupConLoss(reduction=named_elsewhere)  # type: ignore[arg-type]
reduction: Reduction = "sum"
assert_type(SupConLoss(reduction=reduction)(features, labels), Tensor)

# open_clip's may be a dict, as output_dict says.
assert_type(ClipLoss()(features, features, 10.0), Tensor)
assert_type(ClipLoss()(features, features, 10.0, output_dict=True), dict[str, Tensor])
ClipLoss()(features)  # type: ignore[call-overload]

# Options are what they were given as.
assert_type(SupConLoss().temperature, float | Tensor)
assert_type(SupConLoss().reduction, Reduction)
assert_type(SupConLoss().queue, MemoryQueue | None)
assert_type(PSCLoss(8, 16).denominator, Denominator)
assert_type(NTXentLoss().queue, MemoryQueue | None)
assert_type(PSCLoss(8, 16).prototypes, nn.Parameter)
assert_type(PSCLoss(8, 16).logits(features), Tensor)
assert_type(SupConLoss().chance_level(8), float)
assert_type(len(MemoryQueue(64, 16)), int)

# What the encoder gives; of a module, anything.
assert_type(fastsupcon.grad_cache(PSCLoss(8, 16).logits, features, chunk=4), Tensor)
embedded: Tensor = fastsupcon.grad_cache(nn.Linear(16, 8), features, chunk=4)
fastsupcon.grad_cache(nn.Linear(16, 8), features)  # type: ignore[call-arg]

assert_type(F.supcon_loss(features, labels, temperature=nn.Parameter(torch.tensor(0.1))), Tensor)
assert_type(F.self_logsumexp(features, scale=10), Tensor)
F.cross_logsumexp(features, features, mask=labels)  # type: ignore[call-arg]

assert_type(fastsupcon.diagnostics.diagnose(features, labels), dict[str, Tensor])
assert_type(fastsupcon.diagnostics.similarities(features), tuple[Tensor, Tensor])
