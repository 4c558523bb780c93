"""open_clip's ClipLoss without the matrices of logits. open_clip itself is not imported. Tested with open_clip 3.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..backends._dtypes import no_autocast
from ..losses._frame import Loss
from ..losses.infonce import single_positives
from ..problem import Pairs
from ..rows import wide_number


class ClipLoss(Loss):
    """open_clip's ClipLoss, its value and gradients, in O(N D) memory.

        logits = logit_scale image_features text_features^T + logit_bias
        loss = half of the mean cross-entropy of the rows against 0 ... N - 1, and half of that of the columns

    Features are used as they come (open_clip's models give rows of unit length). Both directions come from one pass over the logits, in
    float32 for half features, also under autocast: 2 N^2 D flops forward and 6 N^2 D backward.

    >>> loss = ClipLoss(cache_labels=True)
    >>> loss(image_features, text_features, logit_scale).backward()

    Args:
        local_loss, gather_with_grad, rank, use_horovod: how features of several processes are gathered; in one process they say nothing,
            in open_clip neither.
        cache_labels: keep the numbers of the pairs from call to call, for each device: one launch less on a GPU.
        world_size: the number of processes; 1.
        backend: see :func:`fastsupcon.functional.self_logsumexp`.

    Raises:
        NotImplementedError: ``world_size`` is above 1.
    """

    local_loss: bool
    gather_with_grad: bool
    cache_labels: bool
    rank: int
    world_size: int
    use_horovod: bool
    backend: str
    __call__: Callable[..., Any]  # to a tensor, or to a dict as output_dict says

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        if world_size != 1:
            raise NotImplementedError(
                f"world_size must be 1, got {world_size}: features of several processes come with fastsupcon's distributed losses. "
                "Until then open_clip's own ClipLoss serves there"
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
        """The loss, 0-d, in float32 or for float64 features in float64; with ``output_dict`` under the name "contrastive_loss".

        Args:
            image_features: [N, D].
            text_features: [N, D], of the same dtype and on the same device.
            logit_scale: 1 / temperature, a number or a tensor of one element, which may require grad.
            logit_bias: the same, or None. It moves no softmax, so that it changes neither the loss nor another gradient, and its own is 0.
        """
        _checks.rows("image_features", image_features)
        _checks.rows_like("text_features", text_features, "image_features", image_features)
        if len(text_features) != len(image_features):
            raise ValueError(f"text_features must have shape {list(image_features.shape)}, got {list(text_features.shape)}")
        _checks.scale("logit_scale", logit_scale)
        if logit_bias is not None:
            _checks.scale("logit_bias", logit_bias)
        with no_autocast(image_features):
            numbers = self._numbers(len(image_features), image_features.device)
            scale = wide_number(logit_scale, image_features)
            pairs = Pairs(image_features, text_features, scale, row_keys=numbers, column_keys=numbers)
            loss = single_positives(pairs, [], True, self.backend).mean()
            if logit_bias is not None:  # so that it gets a gradient, for which DistributedDataParallel waits, and shows if it is not finite
                loss = loss + 0 * wide_number(logit_bias, image_features)
        return {"contrastive_loss": loss} if output_dict else loss

    def _numbers(self, count: int, device: torch.device) -> Tensor:
        numbers = self.labels.get(device)
        if numbers is None or len(numbers) != count:
            numbers = torch.arange(count, device=device)
            # A compiled graph makes them in passing; what is made in inference mode could not be saved for a backward.
            if self.cache_labels and not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
                self.labels[device] = numbers
        return numbers
