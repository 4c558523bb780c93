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
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank, pytorch_cos_sim

from .. import _checks, operators
from ..backends._dtypes import no_autocast
from ..blocks import logaddexp
from ..losses import supcon
from ..problem import Line, Pairs
from ..rows import wide_number, wide_rows


class _Ranking:
    """What is ours in a ranking loss, beside the option ``backend``; the other options are those of the library's class behind this one."""

    similarity_fct: Callable[..., Tensor]
    scale: float | Tensor
    gather_across_devices: bool
    directions: Sequence[str]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float

    def __init__(self, *arguments: Any, backend: str = "auto", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backend = backend
        _unit(self.similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        _check(embeddings)
        with no_autocast(embeddings[0]):
            return _ranking_loss(self, embeddings)


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
    and so is doc_to_query where ``gather_across_devices`` or a ``hardness_mode`` parts it from query_to_doc.

    >>> loss = MultipleNegativesRankingLoss(model)  # then as any loss of SentenceTransformerTrainer

    Args:
        model, scale, gather_across_devices, directions, partition_mode, hardness_mode, hardness_strength: the library's.
        similarity_fct: ``cos_sim`` (the default) or ``dot_score`` of sentence_transformers.util. Others are a ValueError.
        backend: see :func:`fastsupcon.functional.self_logsumexp`.
    """


class CachedMultipleNegativesRankingLoss(_Cached, _Ranking, losses.CachedMultipleNegativesRankingLoss):
    """:class:`MultipleNegativesRankingLoss` behind GradCache: options, values and gradients of the library's class of this name.

    ``mini_batch_size`` bounds what the model needs, and nothing else: the loss is one call over the whole batch.
    """


class SupConLoss(nn.Module):
    """:class:`fastsupcon.SupConLoss` of sentences with class labels, brought to unit length.

    A dataset of one text column and a ``label`` column of integers; further text columns are further views of the sample. Batches should
    hold several samples of a class: ``BatchSamplers.GROUP_BY_LABEL``.

    >>> loss = SupConLoss(model, temperature=0.1)  # then as any loss of SentenceTransformerTrainer

    Args:
        model: SentenceTransformer.
        temperature: a number or a 0-d tensor, which may require grad.
        **options: of :class:`fastsupcon.SupConLoss`, with the defaults ``base_temperature=None`` and ``normalize=True``.
    """

    def __init__(self, model: nn.Module, temperature: float | Tensor = 0.07, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = supcon.SupConLoss(temperature, **({"base_temperature": None, "normalize": True} | options))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings([self.model(features)["sentence_embedding"] for features in sentence_features], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        return self.loss(embeddings[0] if len(embeddings) == 1 else torch.stack(embeddings, 1), labels)

    def get_config_dict(self) -> dict[str, object]:
        """For the model card."""
        return {name: value for name, value in self.loss.options.items() if not isinstance(value, (Tensor, nn.Module))}


class CachedSupConLoss(_Cached, CachedLossMixin, SupConLoss):
    """:class:`SupConLoss` behind GradCache: a batch as large as the loss wants it, in the memory of ``mini_batch_size`` sentences.

    Args:
        model, temperature, **options: of :class:`SupConLoss`.
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
        **options: Any,
    ) -> None:
        super().__init__(model, temperature, **options)
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.forward_cached(sentence_features, labels)


def _ranking_loss(options: _Ranking, embeddings: list[Tensor]) -> Tensor:
    """Of queries, their documents and their hard negatives, each [N, D]; the mean over this process's queries."""
    unit, n, device = _unit(options.similarity_fct), len(embeddings[0]), embeddings[0].device
    queries, *docs = map(all_gather_with_grad, embeddings) if options.gather_across_devices else embeddings
    world, alone = len(queries), len(queries) == n
    here = slice(0, n) if alone else slice(get_rank() * n, (get_rank() + 1) * n)
    query, positive, candidates = queries[here], docs[0][here], torch.cat(docs)
    keys = torch.arange(world, device=device)
    own, of_query = keys[here], keys.repeat(len(docs))

    _checks.scale("scale", options.scale)
    scale = wide_number(options.scale, query)
    hardness = options.hardness_mode if options.hardness_strength > 0 else None

    if hardness is None and set(options.directions) == {"query_to_doc"}:
        of_positive = of_query.masked_fill(torch.arange(len(candidates), device=device) >= world, -1)
        pairs = Pairs(query, candidates, scale, unit, row_keys=own, column_keys=of_positive)
        return operators.loss(pairs, Line(all=1, similarity=-1), backend=options.backend)

    def log_sum(pairs: Pairs, name: str = "all") -> Tensor:
        return operators.terms(pairs, (name,), backend=options.backend)[0][0]

    to_documents, to_queries = Pairs(query, candidates, scale, unit), Pairs(positive, queries, scale, unit)
    wide_query = wide_rows(query, unit)
    own_logits = torch.stack([(wide_query * wide_rows(doc[here], unit)).sum(1) for doc in docs], 1) * scale
    if hardness is None and alone and "doc_to_query" in options.directions:  # the same products, summed the other way
        rows, columns = operators.terms(to_documents, ("all",), ("all",), backend=options.backend)
        log_sums = [rows[0], columns[0, :n]]
    else:
        log_sums = [log_sum(to_documents) if hardness is None else _harder(options, to_documents, own_logits, own, of_query)]
        if "doc_to_query" in options.directions:
            log_sums.append(log_sum(to_queries))
    if "query_to_query" in options.directions:
        others = Pairs(query, scale=scale, unit=unit) if alone else Pairs(query, queries, scale, unit, own_column=own)
        log_sums.append(log_sum(others))
    if "doc_to_doc" in options.directions:
        log_sums.append(log_sum(Pairs(positive, candidates, scale, unit, row_keys=own, column_keys=of_query), "different"))
    joint = options.partition_mode == "joint"
    total = functools.reduce(logaddexp, log_sums) if joint else sum(log_sums) / len(log_sums)
    return (total - own_logits[:, 0]).mean()


def _harder(options: _Ranking, to_documents: Pairs, own_logits: Tensor, own: Tensor, of_query: Tensor) -> Tensor:
    """query_to_doc, in which the logits of some negatives are raised by strength * cos, a constant in the gradient.

    Among the other queries' documents that is a scale of scale + strength, with the gradient of ``scale`` in the rows.
    """
    mode, strength, scale = options.hardness_mode, options.hardness_strength, to_documents.scale
    others = to_documents._replace(row_keys=own, column_keys=of_query)
    if mode != "hard_negatives":
        query, candidates = (_damped(x, scale / (scale + strength)) for x in (others.rows, others.columns))
        others = others._replace(rows=query, columns=candidates, scale=scale + strength)
    ((of_others,), _) = operators.terms(others, ("different",), backend=options.backend)
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


def _check(embeddings: list[Tensor]) -> None:
    if len(embeddings) < 2:
        raise ValueError(f"a row must hold an anchor and a positive at least, got {len(embeddings)} text column(s)")
    for k, x in enumerate(embeddings):
        _checks.rows(f"the embeddings of column {k}", x, columns=embeddings[0].shape[1])
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
