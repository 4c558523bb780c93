"""pytorch-metric-learning's SupConLoss without the matrix of similarities, and its cross-batch memory without the lists of all pairs.

Tested with pytorch-metric-learning 2.4 to 2.9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import ClassWeightedReducer
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from .. import _checks
from ..backends._dtypes import no_autocast
from ..blocks import terms
from ..losses._contrast import shared
from ..losses._frame import HasGroup, check_backend, class_labels, ranks_of, said
from ..options import Across, Backend
from ..problem import Pairs
from ..ranks import Ranks
from ..rows import wide_number, wide_rows

_BLOCK = 2**20  # entries of a row block of listed pairs: 4 MiB a matrix in float32, of which some five live at a time


class AllPairs(NamedTuple):
    """An ``indices_tuple`` that stands for all pairs by their labels, but those of row i with column ``own_column[i]`` (-1: with none)."""

    own_column: Tensor | None = None


class SupConLoss(HasGroup, losses.SupConLoss):
    """pytorch-metric-learning's SupConLoss, its values and gradients, in O((N + M) D) memory.

    Called, and given reducers, regularizers, miners and wrappers, as the library's own, of which it is a subclass. All pairs by their
    labels go through fastsupcon's kernels: 2 N M D flops forward and 6 N M D backward, without ``ref_emb`` about half of the forward.
    Pairs that a miner lists follow no labels: they are computed in plain PyTorch, 6 N M D flops up to 2^20 of N M, and beyond that in
    blocks of rows, again in the backward: 8 N M D flops and O((N + M) D) memory beside the lists.

    As in the library, anchors without a positive leave the mean (``AvgNonZeroReducer``, which also drops a NaN), and the loss is 0 if
    there is no positive pair, or no negative one, at all. The losses that the reducer gets are float32 for half embeddings.

    With ``group`` each rank calls with rows of its own, as many as it has. They meet all ranks' rows (of ``ref_emb``: all ranks' of those),
    and the reducer gets the losses of all ranks' anchors, so that the value is that of one process with all rows, on every rank the same.
    Gradients are for DistributedDataParallel to average. A regularizer sees this rank's rows. It is instead of the library's
    DistributedLossWrapper, and not to be put into it.

    Args:
        temperature: a number or a 0-d tensor, which may require grad.
        group: the process group whose ranks' rows meet; None: this process alone. With one, an ``indices_tuple`` that lists pairs and a
            ``ClassWeightedReducer``, which name rows of one process by number, are a ValueError.
        across: "gather" or "ring", see ``fastsupcon.functional.supcon_loss``.
        backend: "auto", the fastest that serves these rows, or one by name.
        **options: ``reducer``, ``distance`` (CosineSimilarity, the default, or DotProductSimilarity), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, or ``distance`` is no dot product; the text
            names it.

    Examples:
        >>> loss = SupConLoss(temperature=0.1)
        >>> loss(embeddings, labels).backward()
    """

    temperature: float | Tensor
    distance: Any
    reducer: Any
    zero_losses: Callable[[], dict[str, Any]]

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        group: ProcessGroup | None = None,
        across: Across = "gather",
        backend: Backend = "auto",
        **options: Any,
    ) -> None:
        _checks.temperature("temperature", temperature)
        ranks_of(group, across)
        super().__init__(temperature=temperature, **options)
        check_backend(backend)
        self.group, self.across, self.backend = group, across, backend
        _unit(self.distance)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: AllPairs | tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> Any:
        ranks = ranks_of(self.group, self.across)
        least = 1 if ranks is None else 0
        _checks.rows("embeddings", embeddings, least=least)
        _checks.rows("ref_emb", ref_emb, columns=embeddings.shape[1], least=least)
        _checks.on_device("ref_emb", ref_emb, embeddings.device)
        _record_norms(self.distance, embeddings, ref_emb)
        if indices_tuple is None or isinstance(indices_tuple, AllPairs):
            values = self._all_pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels, ranks)
        elif ranks is None:
            values = self._listed_pairs(embeddings, loss_and_miner_utils.convert_to_pairs(indices_tuple, labels), ref_emb)
        else:
            raise ValueError(
                "indices_tuple must be None or AllPairs with a group, got lists of pairs, which name rows of one process by number: "
                "miners, the library's CrossBatchMemory and its DistributedLossWrapper go with group=None"
            )
        if values is None:
            return self.zero_losses()
        indices = torch.arange(len(values), device=embeddings.device)
        return {"loss": {"losses": values, "indices": indices, "reduction_type": "element"}}

    def _all_pairs(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        all_pairs: AllPairs | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
        ranks: Ranks | None,
    ) -> Tensor | None:
        """Of each anchor [N], of all ranks' where there are several; or None where the library computes nothing."""
        n, m, device = len(embeddings), len(ref_emb), embeddings.device
        if labels is None:
            raise ValueError("labels must be given where indices_tuple does not list the pairs, got None")
        with_itself = ref_labels is None or ref_labels is labels  # so the library tells that column i is row i
        row_keys = class_labels(labels, n, device)
        column_keys = row_keys if ref_labels is None or with_itself else class_labels(ref_labels, m, device, "ref_labels")
        if with_itself and n != m:
            raise ValueError(f"ref_labels must be given for {m} rows of ref_emb beside {n} embeddings, got None")
        diagonal = torch.arange(n, device=device) if with_itself else None
        own = diagonal if all_pairs is None else all_pairs.own_column
        if own is not None:
            _checks.vector("own_column", own, n, device)
        among_themselves = ref_emb is embeddings and own is not None and all_pairs is None
        if ranks is not None:
            if any(isinstance(reducer, ClassWeightedReducer) for reducer in self.reducer.modules()):
                raise ValueError("reducer must not be a ClassWeightedReducer with a group: it looks up labels of one process's rows")
            ranks.meet(
                "SupConLoss of pytorch-metric-learning",
                device,
                {"rows": n, "references": m},
                depth=embeddings.shape[1],
                dtype=(embeddings.dtype, ref_emb.dtype),
                requires_grad=(embeddings.requires_grad, ref_emb.requires_grad),
                ref_emb="embeddings" if among_themselves else "others",
                own_column=own is not None,
                temperature=said(self.temperature),
                normalize=_unit(self.distance),
            )
            n, m = ranks.total("rows"), ranks.total("references")
            own = None if own is None else torch.where(own < 0, -1, own + ranks.first("references"))  # the number among all ranks' columns
        if n * m - (0 if own is None else n) <= 2:
            return None
        scale = 1 / wide_number(self.temperature, embeddings)
        if among_themselves:
            pairs = Pairs(embeddings, scale=scale, unit=_unit(self.distance), row_keys=row_keys)
        else:
            wide = torch.promote_types(embeddings.dtype, ref_emb.dtype)
            pairs = Pairs(embeddings.to(wide), ref_emb.to(wide), scale, _unit(self.distance), None, row_keys, column_keys, own)
        if ranks is not None:
            row_keys, column_keys = ranks.gather(row_keys, "rows"), ranks.gather(column_keys, "references")
        several_classes = (row_keys != column_keys[0]).any() | (column_keys != column_keys[0]).any()
        with no_autocast(embeddings):
            block = shared(pairs, ranks, "rows", "rows" if among_themselves else "references")
            of_rows, _ = terms(block, ("all", "similarity", "count"), backend=self.backend)
            log_sum, similarity, count = of_rows.unbind()
            values = log_sum - similarity / count.clamp_min(1)
            # The loss of an anchor with a positive is above 0; rounded to 0 or less, it would leave the mean of AvgNonZeroReducer.
            values = torch.where(values > 0, values, torch.finfo(values.dtype).tiny + (values - values.detach()))
            values = values * ((count > 0) & several_classes)  # NaN stays NaN; and to read the latter back would wait for a GPU
            return values if ranks is None else ranks.gather_values(values, "rows")

    def _listed_pairs(self, embeddings: Tensor, pairs: tuple[Tensor, Tensor, Tensor, Tensor], ref_emb: Tensor) -> Tensor | None:
        """The same over the pairs (anchors, positives) and (anchors, negatives) alone."""
        if all(len(indices) <= 1 for indices in pairs) or len(pairs[0]) == 0 or len(pairs[2]) == 0:
            return None
        n, m = len(embeddings), len(ref_emb)
        anchors, positives, others, negatives = pairs
        for indices, bound in ((anchors, n), (positives, m), (others, n), (negatives, m)):
            _checks.within("indices_tuple", indices, 0, bound)
        with no_autocast(embeddings):
            rows, columns = (wide_rows(x, _unit(self.distance)) for x in (embeddings, ref_emb))
            if n * m <= _BLOCK:
                return _block_losses(rows, (anchors, positives), (others, negatives), columns, self.temperature)
            block = max(1, _BLOCK // m)
            blocks = zip(rows.split(block), _by_block(anchors, positives, n, block), _by_block(others, negatives, n, block), strict=True)
            again = functools.partial(checkpoint, _block_losses, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([again(*of_block, columns, self.temperature) for of_block in blocks])


class CrossBatchMemory(losses.CrossBatchMemory):
    """pytorch-metric-learning's CrossBatchMemory. For the SupConLoss of this module and without a miner it lists no pairs.

    The library lists all pairs, 16 bytes each, and compares each positive one with every row of the batch to find those of a row with
    itself: beside that no loss counts. With a miner, pairs of one's own, or another loss it does so here too.

    Of a SupConLoss with a ``group`` each rank's memory holds its own rows, and is met by all ranks' batches: R ranks have R memories of
    ``memory_size`` together. In the library's DistributedLossWrapper each rank's memory holds all ranks' rows.

    Examples:
        >>> loss = CrossBatchMemory(SupConLoss(temperature=0.1), embedding_size=128, memory_size=4096)
        >>> loss(embeddings, labels).backward()
    """

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> Any:
        if len(self.curr_batch_idx) == 0 and getattr(self.loss, "group", None) is not None:
            raise ValueError("embeddings must have a row for the memory at least, got none: the library takes it for full then")
        if isinstance(self.loss, SupConLoss) and not self.miner and input_indices_tuple is None:
            return AllPairs(self.curr_batch_idx if do_remove_self_comparisons else None)
        return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons)


def _unit(distance: Any) -> bool:
    """Whether the distance brings rows to unit length. Others than dot products are refused."""
    kind = type(distance).__name__
    instead = (
        "LpDistance(power=2) of normalized embeddings is CosineSimilarity with half the temperature; for another, take "
        "pytorch_metric_learning.losses.SupConLoss, which builds its matrix"
    )
    if type(distance) not in (CosineSimilarity, DotProductSimilarity):
        raise ValueError(f"distance must be CosineSimilarity or DotProductSimilarity, got {kind}. {instead}")
    if distance.power != 1 or (distance.normalize_embeddings and distance.p != 2):
        raise ValueError(f"distance must have power=1 and p=2, got {kind} with power={distance.power}, p={distance.p}. {instead}")
    unit: bool = distance.normalize_embeddings
    return unit


def _record_norms(distance: Any, embeddings: Tensor, ref_emb: Tensor) -> None:
    """What the distance records of the rows when it is called."""
    if distance.collect_stats:
        rows, columns = embeddings.detach(), ref_emb.detach()
        distance.reset_stats()
        distance.set_default_stats(rows, columns, distance.maybe_normalize(rows), distance.maybe_normalize(columns))


def _by_block(rows: Tensor, columns: Tensor, n: int, block: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of rows and columns by blocks of rows, which are counted from the block's first."""
    rows, order = rows.long().sort()
    starts = torch.arange(0, n, block, device=rows.device)
    sizes = torch.diff(torch.searchsorted(rows, starts), append=rows.new_tensor([len(rows)])).tolist()  # waits for a GPU, as miners do
    return list(zip((rows % block).split(sizes), columns.long()[order].split(sizes), strict=True))


def _block_losses(
    rows: Tensor,
    positives: tuple[Tensor, Tensor],
    negatives: tuple[Tensor, Tensor],
    columns: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """Of a block of rows. Its masks are made here, so that they are not kept for the backward."""
    with no_autocast(rows):
        logits = rows @ columns.T / temperature
        positive, negative = (torch.zeros_like(logits, dtype=torch.bool) for _ in range(2))
        positive[positives] = True
        negative[negatives] = True
        if rows.is_cpu and (positive & negative).any():
            raise ValueError("indices_tuple must list a pair as positive or as negative, got one that is both")
        count = positive.sum(1)
        listed = logits.masked_fill(~(positive | negative), -torch.inf)
        shift = listed.detach().amax(1, keepdim=True)  # so that a loss near 0 is no difference of large numbers
        unlisted = shift == -torch.inf
        log_sum = (listed - shift.masked_fill(unlisted, 0)).logsumexp(1).masked_fill(unlisted[:, 0], 0)
        mean = (logits - shift).masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
        return (log_sum - mean) * (count > 0)
