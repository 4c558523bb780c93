"""What goes wrong in a run and is told in a line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from files import ended

# Their text is all that a person needs.
TOLD = (ValueError, OSError, FloatingPointError, MemoryError)


@contextlib.contextmanager
def what_to_lower(
    changes: str = "lower --batch, --image-size or --width, in an evaluation --eval-batch, or take --precision bf16",
) -> Iterator[None]:
    """Too little memory, of the device's or the host's allocator, becomes a MemoryError that says what to change.

    So does, as an OSError, the death of a worker, which torch raises from a signal handler wherever the run is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if str(error).startswith("DataLoader worker"):
            raise ended("images", error) from error
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        told = " ".join(str(error).split())
        raise MemoryError(f"the memory does not suffice: {changes} ({told})") from error
