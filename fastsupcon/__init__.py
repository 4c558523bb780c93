"""fastsupcon: supervised contrastive losses in fused kernels, in O(N D) memory."""

from importlib.metadata import PackageNotFoundError, version

from . import diagnostics, functional
from .grad_cache import grad_cache
from .losses.balanced import BalancedSupConLoss
from .losses.infonce import InfoNCELoss
from .losses.ntxent import NTXentLoss
from .losses.paco import PaCoLoss
from .losses.prototypes import PrototypeCrossEntropyLoss
from .losses.psc import PSCLoss
from .losses.supcon import SupConLoss
from .queue import MemoryQueue

try:
    __version__ = version("fastsupcon")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BalancedSupConLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "NTXentLoss",
    "PSCLoss",
    "PaCoLoss",
    "PrototypeCrossEntropyLoss",
    "SupConLoss",
    "diagnostics",
    "functional",
    "grad_cache",
]


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
