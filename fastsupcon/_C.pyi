"""The compiled extension (csrc/bindings.cpp, csrc/cuda/bind.cpp), whose functions take addresses, by position alone.

tests/test_typed.py compares this with the extension.
"""

from typing import ClassVar

class Scalar:
    f32: ClassVar[Scalar]
    f64: ClassVar[Scalar]
    f16: ClassVar[Scalar]
    bf16: ClassVar[Scalar]

class Problem:
    def __init__(
        self,
        scalar: Scalar,
        rows: int,
        columns: int,
        depth: int,
        a: int,
        b: int,
        bias: int,
        row_keys: int,
        column_keys: int,
        own_column: int,
        scale: float,
        scale_address: int,
        unit: bool,
        /,
    ) -> None: ...

class Quantities:
    def __init__(self, first: int, step: int, mask: int, /) -> None: ...

class Incoming:
    def __init__(self, values: Quantities, grads: Quantities, /) -> None: ...

class Outgoing:
    def __init__(self, rows: int, columns: int, bias: int, scale: int, /) -> None: ...

class Line:
    class Reduction:
        mean: ClassVar[Line.Reduction]
        sum: ClassVar[Line.Reduction]
        none: ClassVar[Line.Reduction]

    def __init__(
        self,
        all: float,
        different: float,
        equal: float,
        similarity: float,
        log_count: float,
        factor: float,
        lone: float,
        skip_lone: bool,
        reduction: Reduction,
        /,
    ) -> None: ...

class cpu:  # these two are modules
    @staticmethod
    def instruction_sets() -> list[str]: ...
    @staticmethod
    def instruction_set() -> str: ...
    @staticmethod
    def threads() -> str: ...
    @staticmethod
    def micro_kernel(scalar: Scalar, times: int, threads: int, /) -> float: ...
    @staticmethod
    def kept_size(rows: int, columns: int, depth: int, self_shape: bool, /) -> int: ...
    @staticmethod
    def forward(problem: Problem, rows: Quantities, columns: Quantities, norms: int, kept: int, threads: int, /) -> None: ...
    @staticmethod
    def backward(problem: Problem, rows: Incoming, columns: Incoming, norms: int, kept: int, out: Outgoing, threads: int, /) -> None: ...
    @staticmethod
    def loss(problem: Problem, line: Line, mask: int, kept: int, exponentials: int, loss: int, threads: int, /) -> None: ...
    @staticmethod
    def loss_backward(
        problem: Problem, line: Line, mask: int, kept: int, exponentials: int, grad: int, out: Outgoing, threads: int, /
    ) -> None: ...

def without_cuda() -> str: ...

class cuda:  # where without_cuda() is empty
    class Plan:
        @property
        def bytes(self) -> int: ...
        def run(self, scratch: int, device: int, stream: int, /) -> None: ...

    @staticmethod
    def unusable(device: int, /) -> str: ...
    @staticmethod
    def forward(problem: Problem, rows: Quantities, columns: Quantities, norms: int, tf32: bool, device: int, /) -> Plan: ...
    @staticmethod
    def backward(problem: Problem, rows: Incoming, columns: Incoming, norms: int, out: Outgoing, tf32: bool, device: int, /) -> Plan: ...
    @staticmethod
    def loss(problem: Problem, line: Line, mask: int, kept: int, loss: int, tf32: bool, device: int, /) -> Plan: ...
    @staticmethod
    def loss_backward(problem: Problem, line: Line, mask: int, kept: int, grad: int, out: Outgoing, tf32: bool, device: int, /) -> Plan: ...
    @staticmethod
    def line(line: Line, rows: int, values: Quantities, loss: int, device: int, stream: int, /) -> None: ...
    @staticmethod
    def line_backward(line: Line, rows: int, values: Quantities, grad: int, grads: Quantities, device: int, stream: int, /) -> None: ...
