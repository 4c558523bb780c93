"""open_clip's ClipLoss without the matrices of logits. open_clip itself is not imported. Tested with open_clip 3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import _checks
from ..backends._dtypes import no_autocast
from ..losses._contrast import shared
from ..losses._frame import Loss, ranks_of, reduce, said
from ..losses.infonce import single_positives
from ..options import Backend
from ..problem import Pairs
from ..ranks import Ranks
from ..rows import wide_number
from ._world import mean_of_own, world


class ClipLoss(Loss):
    """open_clip's ClipLoss, its value and gradients, in O(N D) memory.

        logits = logit_scale image_features text_features^T + logit_bias
        loss = half of the mean cross-entropy of the rows against 0 ... N - 1, and half of that of the columns

    Features are used as they come (open_clip's models give rows of unit length). Both directions come from one pass over the logits, in
    float32 for half features, also under autocast: 2 N^2 D flops forward and 6 N^2 D backward.

    **Several processes** (``world_size`` above 1). L is the loss of all ranks' pairs, L_r the mean over rank r's images and texts, each
    against all ranks'; L is the average of the L_r. DistributedDataParallel averages the ranks' gradients, of which R ranks then have

        local_loss  gather_with_grad | value | of the features, open_clip           here | of the scale
        False       False            | L     | dL / R                               dL   | dL
        False       True             | L     | dL                                   dL   | dL
        True        False            | L_r   | the part of dL in which features     dL   | dL
                                     |       | are rows, not columns of logits
        True        True             | L_r   | dL                                   dL   | dL

    so that the value is open_clip's, and the gradient that of its ``gather_with_grad=True``. Features are gathered once, and of the
    gradient nothing but numbers of O(N); each rank computes its own rows of the logits, whatever ``local_loss`` says. Ranks may have
    unlike numbers of pairs, which open_clip cannot gather; L_r is weighted then, so that L remains the average.

    Args:
        local_loss: whether to return L_r instead of L, the same gradient with it.
        gather_with_grad: either way the gradient is the whole one.
        cache_labels: keep the numbers of the pairs from call to call, for each device: one launch less on a GPU.
        rank: this process's number in torch.distributed's default group.
        world_size: that group's size; with 1, features of this process are contrasted alone.
        use_horovod: with ``world_size`` above 1 an error; else it says nothing, in open_clip neither.
        backend: "auto", the fastest that serves these rows, or one by name.

    Raises:
        NotImplementedError: features are to be gathered by Horovod.
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, or ``rank`` and ``world_size`` are not those
            of the default group; the text names it.

    Examples:
        >>> loss = ClipLoss(cache_labels=True, rank=args.rank, world_size=args.world_size)
        >>> loss(image_features, text_features, logit_scale).backward()
    """

    local_loss: bool
    gather_with_grad: bool
    cache_labels: bool
    rank: int
    world_size: int
    use_horovod: bool
    backend: Backend

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        if use_horovod and world_size != 1:
            raise NotImplementedError(
                f"use_horovod must be False with world_size={world_size}, got True: features are gathered by torch.distributed"
            )
        super().__init__(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
            use_horovod=use_horovod,
            backend=backend,
        )
        self.labels: dict[torch.device, Tensor] = {}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features: [N, D].
            text_features: [N, D], of the same dtype and on the same device.
            logit_scale: 1 / temperature, a number or a tensor of one element, which may require grad.
            logit_bias: the same, or None. It moves no softmax, so that it changes neither the loss nor another gradient, and its own is 0.
            output_dict: whether to return a dict, with the loss under the name "contrastive_loss".

        Returns:
            0-d, in float32, for float64 features in float64.
        """
        ranks = self._ranks()
        least = 1 if ranks is None else 0
        _checks.rows("image_features", image_features, least=least)
        _checks.rows_like("text_features", text_features, "image_features", image_features, least=least)
        if len(text_features) != len(image_features):
            raise ValueError(f"text_features must have shape {list(image_features.shape)}, got {list(text_features.shape)}")
        _checks.scale("logit_scale", logit_scale)
        if logit_bias is not None:
            _checks.scale("logit_bias", logit_bias)
        numbers = self._numbers(len(image_features), image_features.device)
        if ranks is not None:
            ranks.meet(
                "ClipLoss",
                image_features.device,
                {"pairs": len(image_features)},
                depth=image_features.shape[1],
                dtype=image_features.dtype,
                requires_grad=(image_features.requires_grad, text_features.requires_grad),
                logit_scale=said(logit_scale),
                local_loss=self.local_loss,
            )
            numbers = numbers + ranks.first("pairs")
        with no_autocast(image_features):
            scale = wide_number(logit_scale, image_features)
            pairs = Pairs(image_features, text_features, scale, row_keys=numbers, column_keys=numbers)
            losses = single_positives(shared(pairs, ranks, "pairs", "pairs"), [], True, self.backend)
            loss = mean_of_own(losses, ranks, "pairs") if self.local_loss else reduce(losses, "mean", ranks=ranks)
            if logit_bias is not None:  # so that it gets a gradient, for which DistributedDataParallel waits, and shows if it is not finite
                loss = loss + 0 * wide_number(logit_bias, image_features)
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:  # output_dict says which it gives

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: float | Tensor,
            logit_bias: float | Tensor | None = None,
            output_dict: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: float | Tensor,
            logit_bias: float | Tensor | None = None,
            *,
            output_dict: Literal[True],
        ) -> dict[str, Tensor]: ...

        @overload
        def __call__(
            self,
            image_features: Tensor,
            text_features: Tensor,
            logit_scale: float | Tensor,
            logit_bias: float | Tensor | None = None,
            output_dict: bool = False,
        ) -> Tensor | dict[str, Tensor]: ...

        def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def _ranks(self) -> Ranks | None:
        if self.world_size == 1:
            return None
        ranks = ranks_of(world(True), "gather")
        found = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        if (self.rank, self.world_size) != found:
            source = "torch.distributed has no process group of several" if ranks is None else "torch.distributed's default group says"
            raise ValueError(f"rank and world_size must be {found[0]} and {found[1]}, as {source}, got {self.rank} and {self.world_size}")
        return ranks

    def _numbers(self, count: int, device: torch.device) -> Tensor:
        numbers = self.labels.get(device)
        if numbers is None or len(numbers) != count:
            numbers = torch.arange(count, device=device)
            # A compiled graph makes them in passing; what is made in inference mode could not be saved for a backward.
            if self.cache_labels and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
                self.labels[device] = numbers
        return numbers
