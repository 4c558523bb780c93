"""sentence-transformers' in-batch losses without the matrix of similarities, and the supervised contrastive loss that it lacks.

Subclasses of the library's losses with the same names, options and values; their cached forms (GradCache) bring the batch through the model
in mini-batches and then compute the loss of all rows at once. Tested with sentence-transformers 6.0 to 6.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import sentence_transformers
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if int(sentence_transformers.__version__.split(".")[0]) < 6:
    raise ImportError(f"fastsupcon.integrations needs sentence-transformers >= 6.0, got {sentence_transformers.__version__}")

from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import all_gather, cos_sim, dot_score, pytorch_cos_sim
from torch.distributed import ProcessGroup

from .. import _checks, operators
from ..backends._dtypes import no_autocast
from ..blocks import logaddexp, terms
from ..losses import supcon
from ..losses._contrast import numbers, shared
from ..losses._frame import check_backend, ranks_of, said
from ..options import Backend
from ..problem import Line, Pairs
from ..ranks import Ranks
from ..rows import wide_number, wide_rows
from ._world import mean_of_own, world


class _Ranking:
    """What is ours in a ranking loss, beside the option ``backend``; the other options are those of the library's class behind this one."""

    similarity_fct: Callable[..., Tensor]
    scale: float | Tensor
    gather_across_devices: bool
    directions: Sequence[str]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float

    def __init__(self, *arguments: Any, backend: Backend = "auto", **options: Any) -> None:
        check_backend(backend)
        super().__init__(*arguments, **options)
        self.backend = backend
        _unit(self.similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        ranks = ranks_of(_group(self.gather_across_devices), "gather")
        _check(embeddings, least=1 if ranks is None else 0)
        with no_autocast(embeddings[0]):
            return _ranking_loss(self, embeddings, ranks)


class _OfEmbeddings(Protocol):
    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor: ...


class _Cached:
    """Of a loss with its embeddings in mini-batches, which is not computed in mini-batches again."""

    def calculate_loss(
        self: _OfEmbeddings, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        loss = self.compute_loss_from_embeddings([torch.cat(batches) for batches in reps], labels)
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


class MultipleNegativesRankingLoss(_Ranking, losses.MultipleNegativesRankingLoss):
    """sentence-transformers' MultipleNegativesRankingLoss (InfoNCE), its options, values and gradients, in O((N + M) D) memory.

        L_i = log sum over the candidates of exp(scale cos) - scale cos(q_i, d_i)

    The candidates are all M documents, positives and hard negatives, and with more ``directions`` also the other queries (query_to_query),
    the queries for the document d_i (doc_to_query), and the documents of other queries for d_i (doc_to_doc): in one sum, or with
    ``partition_mode="per_direction"`` in one each, averaged.

    2 N M D flops forward and 6 N M D backward for query_to_doc, with doc_to_query of the same pass; each other direction is a pass more,
    and so is doc_to_query where a ``hardness_mode`` parts it from query_to_doc.

    With ``gather_across_devices`` each process's rows meet those of all ranks of torch.distributed's default group. Value and gradient are
    the library's: the mean over this rank's queries, and what DistributedDataParallel's average makes the gradient of the mean over all.
    Rows travel once, and of the gradient nothing but numbers of O(N + M). Ranks may have unlike numbers of queries, which the library
    cannot gather; the value is weighted then, so that the average over ranks is the mean over all queries.

    The arguments are the library's. ``gather_across_devices`` without a process group when the loss is called is a warning, once, as in the
    library. ``similarity_fct`` may be ``cos_sim`` (the default) or ``dot_score`` of sentence_transformers.util; others are a ValueError.

    Args:
        backend: "auto", the fastest that serves these rows, or one by name.

    Examples:
        >>> loss = MultipleNegativesRankingLoss(model)  # then as any loss of SentenceTransformerTrainer
    """


class CachedMultipleNegativesRankingLoss(_Cached, _Ranking, losses.CachedMultipleNegativesRankingLoss):
    """``MultipleNegativesRankingLoss`` behind GradCache: options, values and gradients of the library's class of this name.

    ``mini_batch_size`` bounds what the model needs, and nothing else: the loss is one call over the whole batch.
    """


class SupConLoss(nn.Module):
    """``fastsupcon.SupConLoss`` of sentences with class labels, brought to unit length.

    A dataset of one text column and a ``label`` column of integers; further text columns are further views of the sample. Batches should
    hold several samples of a class: ``BatchSamplers.GROUP_BY_LABEL``.

    Args:
        model: SentenceTransformer.
        temperature: a number or a 0-d tensor, which may require grad.
        gather_across_devices: the loss of all ranks' rows, the same on each, of torch.distributed's default group at the time of a call:
            the trainer may initialise it after this is made. Else as for ``MultipleNegativesRankingLoss``.
        **options: of ``fastsupcon.SupConLoss``, with the defaults ``base_temperature=None`` and ``normalize=True``.

    Raises:
        ValueError: both ``gather_across_devices`` and a ``group`` are given.

    Examples:
        >>> loss = SupConLoss(model, temperature=0.1)  # then as any loss of SentenceTransformerTrainer
    """

    def __init__(
        self, model: nn.Module, temperature: float | Tensor = 0.07, *, gather_across_devices: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if gather_across_devices and options.get("group") is not None:
            raise ValueError("gather_across_devices=True takes the default group: expected group=None, got a group")
        self.model = model
        self.loss = supcon.SupConLoss(temperature, **({"base_temperature": None, "normalize": True} | options))
        self.gather_across_devices = gather_across_devices

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings([self.model(features)["sentence_embedding"] for features in sentence_features], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        features = embeddings[0] if len(embeddings) == 1 else torch.stack(embeddings, 1)
        if not self.gather_across_devices:
            return self.loss(features, labels)
        return supcon.supcon_loss(features, labels, **(self.loss.options | {"group": _group(True)}))

    def get_config_dict(self) -> dict[str, object]:
        """For the model card."""
        options = {name: value for name, value in self.loss.options.items() if not isinstance(value, (Tensor, nn.Module, ProcessGroup))}
        return options | {"gather_across_devices": self.gather_across_devices}


class CachedSupConLoss(_Cached, CachedLossMixin, SupConLoss):
    """``SupConLoss`` behind GradCache: a batch as large as the loss wants it, in the memory of ``mini_batch_size`` sentences.

    Args:
        model: as ``temperature``, ``gather_across_devices`` and ``options``, that of ``SupConLoss``.
        mini_batch_size: sentences that go through the model at a time.
        mini_batch_num_tokens: instead of it, most tokens at a time.
        show_progress_bar: of the mini-batches.
    """

    forward_cached: Callable[..., Tensor]  # CachedLossMixin's

    def __init__(
        self,
        model: nn.Module,
        temperature: float | Tensor = 0.07,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, temperature, gather_across_devices=gather_across_devices, **options)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.forward_cached(sentence_features, labels)


def _ranking_loss(options: _Ranking, embeddings: list[Tensor], ranks: Ranks | None) -> Tensor:
    """Of queries, their documents and their hard negatives, each [N, D]; the mean over this process's queries."""
    unit, n, device = _unit(options.similarity_fct), len(embeddings[0]), embeddings[0].device
    query, *docs = embeddings
    positive, candidates = docs[0], torch.cat(docs)
    _checks.scale("scale", options.scale)
    if ranks is not None:
        ranks.meet(
            "MultipleNegativesRankingLoss",
            device,
            {"queries": n, "documents": len(candidates)},
            depth=query.shape[1],
            dtype=query.dtype,
            requires_grad=(query.requires_grad, positive.requires_grad, candidates.requires_grad),
            columns=len(embeddings),
            similarity_fct="cos_sim" if unit else "dot_score",
            scale=said(options.scale),
            directions=sorted(options.directions),
            partition_mode=options.partition_mode,
            hardness=(options.hardness_mode, options.hardness_strength),
        )
    own = numbers(n, device, ranks, "queries")
    of_query = own.repeat(len(docs))
    scale = wide_number(options.scale, query)
    hardness = options.hardness_mode if options.hardness_strength > 0 else None

    if hardness is None and ranks is None and set(options.directions) == {"query_to_doc"}:
        of_positive = of_query.masked_fill(torch.arange(len(candidates), device=device) >= n, -1)
        pairs = Pairs(query, candidates, scale, unit, row_keys=own, column_keys=of_positive)
        return operators.loss(pairs, Line(all=1, similarity=-1), backend=options.backend)

    def log_sum(pairs: Pairs, columns: str, name: str = "all") -> Tensor:
        return terms(shared(pairs, ranks, "queries", columns), (name,), backend=options.backend)[0][0]

    to_documents = Pairs(query, candidates, scale, unit)
    wide_query = wide_rows(query, unit)
    own_logits = torch.stack([(wide_query * wide_rows(doc, unit)).sum(1) for doc in docs], 1) * scale
    if hardness is None and "doc_to_query" in options.directions:  # the same products, summed the other way
        rows, columns = terms(shared(to_documents, ranks, "queries", "documents"), ("all",), ("all",), backend=options.backend)
        log_sums = [rows[0], columns[0, :n]]
    elif hardness is None:
        log_sums = [log_sum(to_documents, "documents")]
    else:
        log_sums = [_harder(options, to_documents, own_logits, own, of_query, ranks)]
        if "doc_to_query" in options.directions:
            log_sums.append(log_sum(Pairs(positive, query, scale, unit), "queries"))
    if "query_to_query" in options.directions:
        log_sums.append(log_sum(Pairs(query, scale=scale, unit=unit), "queries"))
    if "doc_to_doc" in options.directions:
        log_sums.append(log_sum(Pairs(positive, candidates, scale, unit, row_keys=own, column_keys=of_query), "documents", "different"))
    joint = options.partition_mode == "joint"
    total = functools.reduce(logaddexp, log_sums) if joint else sum(log_sums) / len(log_sums)
    return mean_of_own(total - own_logits[:, 0], ranks, "queries")


def _harder(options: _Ranking, to_documents: Pairs, own_logits: Tensor, own: Tensor, of_query: Tensor, ranks: Ranks | None) -> Tensor:
    """query_to_doc, in which the logits of some negatives are raised by strength * cos, a constant in the gradient.

    Among the other queries' documents that is a scale of scale + strength, with the gradient of ``scale`` in the rows.
    """
    mode, strength, scale = options.hardness_mode, options.hardness_strength, to_documents.scale
    others = to_documents._replace(row_keys=own, column_keys=of_query)
    if mode != "hard_negatives":
        query, candidates = (_damped(x, scale / (scale + strength)) for x in (others.rows, others.columns))
        others = others._replace(rows=query, columns=candidates, scale=scale + strength)
    ((of_others,), _) = terms(shared(others, ranks, "queries", "documents"), ("different",), backend=options.backend)
    if mode != "in_batch_negatives":
        positive, negatives = own_logits.split([1, own_logits.shape[1] - 1], 1)
        own_logits = torch.cat([positive, negatives + (negatives * (strength / scale)).detach()], 1)
    return logaddexp(of_others, own_logits.logsumexp(1))


class _Damped(torch.autograd.Function):
    """x, with a gradient that is multiplied by a constant. A second derivative would not be the loss's: it is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


_damped: Callable[..., Tensor] = _Damped.apply


def _group(gather: bool) -> ProcessGroup | None:
    if gather and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        all_gather(torch.empty(0))  # for the library's warning that there is nothing to gather
    return world(gather)


def _check(embeddings: list[Tensor], least: int) -> None:
    if len(embeddings) < 2:
        raise ValueError(f"a row must hold an anchor and a positive at least, got {len(embeddings)} text column(s)")
    for k, x in enumerate(embeddings):
        _checks.rows(f"the embeddings of column {k}", x, columns=embeddings[0].shape[1], least=least)
        if x.dtype != embeddings[0].dtype:
            raise TypeError(f"the embeddings of column {k} must have the anchors' dtype {embeddings[0].dtype}, got {x.dtype}")
        if len(x) != len(embeddings[0]):
            raise ValueError(f"the embeddings of column {k} must have {len(embeddings[0])} rows as the anchors have, got {len(x)}")


def _unit(similarity_fct: Callable[..., Tensor]) -> bool:
    """Whether the similarity brings rows to unit length."""
    if similarity_fct in (cos_sim, pytorch_cos_sim):
        return True
    if similarity_fct is dot_score:
        return False
    name = getattr(similarity_fct, "__name__", repr(similarity_fct))
    raise ValueError(
        f"similarity_fct must be cos_sim or dot_score of sentence_transformers.util, got {name}. Others are no dot products: take the loss "
        "of sentence_transformers, which builds the matrix"
    )
