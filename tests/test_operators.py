"""The operator inside PyTorch, on every backend: what autograd, compilers, tracers and transforms see of it.

Values and gradients themselves are test_contract.py's, the losses on top test_losses.py's.
"""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import serves
from contract import ALL, PSC, SCL, Case, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fastsupcon import operators
from fastsupcon.backends import cpu
from fastsupcon.problem import Line, Pairs

SELF = Case(9, d=5, keys="few", rows=SCL)
CROSS = Case(9, 7, d=5, keys="few", own=True, bias=True, learned=True, rows=ALL, columns=ALL)
PLAIN = Case(9, 7, d=5, unit=False, rows=("all",), scale=1.0)
CASES = pytest.mark.parametrize("case", [SELF, CROSS, PLAIN, Case(9, d=5, bias=True, learned=True, keys="few", rows=PSC)], ids=str)
LINES = {"scl": Line(all=1, similarity=-1), "psc": Line(different=1, similarity=-1, lone="skip", reduction="sum")}
DIFFERENTIABLE = ("rows", "columns", "bias", "scale")


def wanted(pairs: Pairs) -> dict[str, Tensor]:
    """What of a problem can have a gradient."""
    return {name: getattr(pairs, name) for name in DIFFERENTIABLE if isinstance(getattr(pairs, name), Tensor)}


def leaves(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Pairs, tuple[Tensor, ...]]:
    pairs = problem(replace(case, dtype=dtype), device)
    return pairs, tuple(x.requires_grad_() for x in wanted(pairs).values())


def replaced(pairs: Pairs, tensors) -> Pairs:
    given = dict(zip(wanted(pairs), tensors, strict=True))
    return Pairs(*(given.get(name, x) for name, x in zip(Pairs._fields, pairs, strict=True)))  # torch 2.6 cannot compile _replace


def total(pairs: Pairs, case: Case, backend: str = "auto") -> Tensor:
    """A number that depends unevenly on every quantity."""
    values = torch.cat([x.flatten() for x in operators.terms(pairs, case.rows, case.columns, backend=backend)])
    values = torch.where(values.isinf(), 0, values)
    return (values * torch.linspace(-1, 1, values.numel(), device=values.device, dtype=values.dtype)).sum()


def plain(pairs: Pairs, case: Case) -> Tensor:
    """The same in plain operators, which share nothing with the package."""
    rows, columns, scale, unit, bias, row_keys, column_keys, own = pairs
    a, b = (torch.nn.functional.normalize(x, dim=1) if unit else x for x in (rows, rows if columns is None else columns))
    own = torch.arange(len(a), device=a.device) if columns is None else own
    pair = torch.ones(len(a), len(b), dtype=torch.bool, device=a.device)
    if own is not None:
        pair = own[:, None] != torch.arange(len(b), device=a.device)
    same = torch.zeros_like(pair)
    if row_keys is not None:
        same = pair & (row_keys[:, None] == (row_keys if columns is None else column_keys))
    s = a @ b.T * scale
    t = s if bias is None else s + bias
    values = []
    for names, dim in ((case.rows, 1), (case.columns, 0)):
        for name in names:
            if name in ("similarity", "count"):
                values.append(((s if name == "similarity" else torch.ones_like(s)) * same).sum(dim))
            else:
                over = {"all": pair, "different": pair & ~same, "equal": same}[name]
                values.append(torch.where(over.any(dim), t.masked_fill(~over, -1e300).logsumexp(dim), 0))
    values = torch.cat(values)
    return (values * torch.linspace(-1, 1, values.numel(), device=values.device, dtype=values.dtype)).sum()


# --- torch.library ---------------------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_forward(backend, device, case, dtype):
    if not serves(backend, dtype, case.d):
        pytest.skip(f"{backend} does not serve {dtype}")
    pairs, _ = leaves(case, device, dtype)
    opcheck(torch.ops.fastsupcon.pairs.default, (*operators._flat(pairs), case.rows, case.columns, backend))


@CASES
def test_opcheck_of_the_backward(backend, device, case):
    pairs = problem(case, device)
    flat = operators._flat(pairs)
    terms = torch.ops.fastsupcon.pairs(*flat, case.rows, case.columns, backend)
    rows, columns, norms, kept = terms
    possible = [name in wanted(pairs) for name in DIFFERENTIABLE]
    for needs in [possible, *([k == only for k in range(4)] for only in range(4) if possible[only])]:
        sides = (case.rows, rows, torch.ones_like(rows), case.columns, columns, torch.ones_like(columns))
        opcheck(torch.ops.fastsupcon.pairs_backward.default, (*flat, *sides, norms, kept, needs, backend))


# --- autograd --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0, 60.0], ids=["bounded", "running"])
@pytest.mark.parametrize("case", [Case(6, d=3), Case(6, d=3, unit=False), replace(CROSS, n=4, m=5, d=3)], ids=str)
def test_gradcheck(backend, device, case, scale):
    """First and second derivatives in float64, in rows, columns, bias and a learned scale."""
    if not serves(backend, torch.float64, case.d):
        pytest.skip(f"{backend} does not serve float64")
    case = replace(case, keys="few", learned=True, scale=scale)
    pairs, tensors = leaves(case, device, torch.float64)

    def quantities(*tensors):
        values = operators.terms(replaced(pairs, tensors), case.rows, case.columns, backend=backend)
        return tuple(torch.where(x.isinf(), 0, x) for x in values if len(x))

    assert torch.autograd.gradcheck(quantities, tensors)
    assert torch.autograd.gradgradcheck(quantities, tensors)


@CASES
def test_a_gradient_penalty_is_right(backend, device, case):
    """Gradients of the norm of a gradient, through the terms, against plain operators."""
    if not serves(backend, torch.float64, case.d):
        pytest.skip(f"{backend} does not serve float64")
    pairs, tensors = leaves(case, device, torch.float64)

    def penalised(loss):
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        penalty = sum((gradient.square().sum() - 1).square() for gradient in gradients)
        return torch.autograd.grad(loss + 10 * penalty, tensors)

    for got, want in zip(penalised(total(pairs, case, backend)), penalised(plain(pairs, case)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("line", LINES)
def test_a_gradient_penalty_of_a_loss_is_right(backend, device, line):
    if not serves(backend, torch.float64, 8):
        pytest.skip(f"{backend} does not serve float64")
    case = Case(16, d=8, keys="few", learned=True, rows=LINES[line].names)
    pairs, _ = leaves(case, device, torch.float64)
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8)).to(device, torch.float64)
    x = torch.randn(16, 6, device=device, dtype=torch.float64)

    def weights(loss_of):
        x.requires_grad_()
        loss = loss_of(pairs._replace(rows=network(x)))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + 10 * (gradient.norm(dim=1) - 1).square().mean()
        return torch.autograd.grad(loss, (*network.parameters(), pairs.scale))

    def plain_loss(pairs):
        a = torch.nn.functional.normalize(pairs.rows, dim=1)
        s, others = a @ a.T * pairs.scale, ~torch.eye(16, dtype=torch.bool, device=device)
        same = (pairs.row_keys[:, None] == pairs.row_keys) & others
        over = others if line == "scl" else others & ~same
        each = s.masked_fill(~over, -torch.inf).logsumexp(1) - (s * same).sum(1) / same.sum(1).clamp_min(1)
        each = each[same.any(1)]
        return each.sum() / (16 if line == "scl" else 1)

    for got, want in zip(weights(lambda p: operators.loss(p, LINES[line], backend=backend)), weights(plain_loss), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_second_backward_gives_the_same_gradients(backend, device):
    pairs, tensors = leaves(CROSS, device)
    value = total(pairs, CROSS, backend)
    first, second = (torch.autograd.grad(value, tensors, retain_graph=again) for again in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, tensors)


@pytest.mark.parametrize("alone", DIFFERENTIABLE)
def test_one_gradient_alone_equals_the_one_among_all(backend, device, alone):
    pairs, tensors = leaves(CROSS, device)
    among = dict(zip(wanted(pairs), torch.autograd.grad(total(pairs, CROSS, backend), tensors), strict=True))
    frozen = pairs._replace(**{name: x.detach().requires_grad_(name == alone) for name, x in wanted(pairs).items()})
    total(frozen, CROSS, backend).backward()
    for name, x in wanted(frozen).items():
        assert (x.grad is not None) == (name == alone)
    torch.testing.assert_close(getattr(frozen, alone).grad, among[alone], rtol=1e-5, atol=1e-6)


def test_a_side_that_nothing_came_back_to(backend, device):
    pairs, tensors = leaves(CROSS, device)
    rows, columns = operators.terms(pairs, ALL, ALL, backend=backend)
    zero = torch.zeros_like(rows)
    of_columns = torch.autograd.grad(columns, tensors, torch.ones_like(columns), retain_graph=True)
    both = torch.autograd.grad((rows, columns), tensors, (zero, torch.ones_like(columns)))
    assert all(torch.equal(x, y) for x, y in zip(of_columns, both, strict=True))
    assert operators.terms(pairs, (), ("all",), backend=backend)[0].shape == (0, 9)


def test_nothing_is_kept_where_no_gradient_is_asked_for(device):
    pairs, _ = leaves(SELF, device)
    assert operators._keep(pairs, "auto") == (device.type == "cpu" and cpu.kept_size(9, 9, 5, True) > 0)
    assert not operators._keep(problem(SELF, device), "auto")
    with torch.no_grad():
        assert not operators._keep(pairs, "auto")
        assert not total(pairs, SELF).requires_grad


def test_a_hook_sees_the_gradient_once(backend, device):
    pairs, (rows,) = leaves(SELF, device)
    seen = []
    rows.register_hook(seen.append)
    operators.loss(pairs, LINES["scl"], backend=backend).backward()
    assert len(seen) == 1 and torch.equal(seen[0], rows.grad)


@CASES
def test_autocast_changes_no_bit(backend, device, case):
    pairs, tensors = leaves(case, device)

    def step():
        value = total(pairs, case, backend)
        return value, *torch.autograd.grad(value, tensors)

    outside = step()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = step()
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


@CASES
def test_any_strides(backend, device, case):
    pairs, tensors = leaves(case, device)
    want = torch.autograd.grad(total(pairs, case, backend), tensors)

    def apart(x):
        return torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) and x.ndim else x

    got = torch.autograd.grad(total(Pairs(*map(apart, pairs)), case, backend), tensors)
    turned = pairs._replace(rows=pairs.rows.t().contiguous().t())
    assert not turned.rows.is_contiguous()
    for first, second, third in zip(want, got, torch.autograd.grad(total(turned, case, backend), tensors), strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
    each = operators.terms(pairs, case.rows, backend=backend)[0][0]
    expanded, whole = torch.ones((), device=device).expand(9), torch.ones(9, device=device)
    assert torch.equal(*(torch.autograd.grad(each, pairs.rows, grad, retain_graph=True)[0] for grad in (expanded, whole)))


# --- compilers and tracers -------------------------------------------------------------------------------------------------------------


def step_of(case: Case, pairs: Pairs, backend: str = "auto"):
    def step(*tensors):
        value = total(replaced(pairs, tensors), case, backend)
        return value, *torch.autograd.grad(value, tensors)

    return step


def agree(got, want) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@CASES
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile_fullgraph(device, case, compiler):
    torch._dynamo.reset()
    pairs, tensors = leaves(case, device)

    def value(*tensors):
        return total(replaced(pairs, tensors), case)

    compiled = torch.compile(value, fullgraph=True, backend=compiler)
    got = compiled(*tensors)
    agree((got.detach(), *torch.autograd.grad(got, tensors)), (x.detach() for x in step_of(case, pairs)(*tensors)))


@pytest.mark.parametrize("shape", ["self", "cross"])
def test_compile_once_for_all_sizes(device, shape):
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []

    def loss(rows, columns, row_keys, column_keys):
        return operators.loss(Pairs(rows, columns, 3.0, True, None, row_keys, column_keys), LINES["scl"])

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (6, 9, 33, 70):
        case = Case(n, n + 3 if shape == "cross" else None, d=8, keys="few")
        pairs, tensors = leaves(case, device)
        arguments = (pairs.rows, pairs.columns, pairs.row_keys, pairs.column_keys)
        got, want = compiled(*arguments), loss(*arguments)
        agree((got, *torch.autograd.grad(got, tensors)), (want, *torch.autograd.grad(want, tensors)))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 8)
        self.scale = torch.nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return operators.loss(Pairs(self.layer(x), None, self.scale, True, None, keys), LINES["scl"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_network_trains(device, strict, dynamic):
    network = Network().to(device)
    x, keys = torch.randn(12, 6, device=device), torch.arange(12, device=device) % 3
    shapes = {"x": {0: torch.export.Dim("n", min=3)}, "keys": {0: torch.export.Dim("n", min=3)}} if dynamic else None
    exported = torch.export.export(network, (x, keys), strict=strict, dynamic_shapes=shapes).module()
    if dynamic:
        x, keys = torch.randn(21, 6, device=device), torch.arange(21, device=device) % 4
    want = torch.autograd.grad(network(x, keys), tuple(network.parameters()))
    parameters = dict(exported.named_parameters())
    got = torch.autograd.grad(exported(x, keys), [parameters[name] for name, _ in network.named_parameters()])
    agree(got, want)


@CASES
def test_make_fx_records_a_step(device, case):
    pairs, tensors = leaves(case, device)
    step = step_of(case, pairs)
    traced = make_fx(step)(*tensors)
    targets = {node.target for node in traced.graph.nodes}
    assert {torch.ops.fastsupcon.pairs.default, torch.ops.fastsupcon.pairs_backward.default} <= targets
    others = tuple((x + torch.randn_like(x) / 8).detach().requires_grad_() for x in tensors)
    agree(traced(*others), step(*others))


@pytest.mark.parametrize("name", LINES)
def test_make_fx_records_a_backward_alone(device, name):
    """Of a loss that was made before, so by a Function."""
    pairs, tensors = leaves(CROSS, device)
    loss = operators.loss(pairs, LINES[name])
    grad = torch.ones((), device=device)
    traced = make_fx(lambda grad: torch.autograd.grad(loss, tensors, grad, retain_graph=True))(grad)
    agree(traced(3 * grad), torch.autograd.grad(loss, tensors, 3 * grad))


@CASES
def test_shapes_without_numbers(device, case):
    """Under FakeTensorMode and on the meta device: shapes, dtypes and gradients' shapes, of every argument."""
    pairs, tensors = leaves(case, device)
    rows, columns = operators.terms(pairs, case.rows, case.columns)
    mode = FakeTensorMode()
    fakes = Pairs(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in pairs))
    metas = Pairs(*(x.to("meta") if isinstance(x, Tensor) else x for x in pairs))
    for given, context in ((fakes, mode), (metas, contextlib.nullcontext())):
        with context:
            inputs = tuple(x.detach().requires_grad_() for x in wanted(given).values())
            got = operators.terms(replaced(given, inputs), case.rows, case.columns)
            assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in (rows, columns)]
            gradients = torch.autograd.grad(sum(x.sum() for x in got), inputs)
            for gradient, leaf, like in zip(gradients, tensors, inputs, strict=True):
                assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, like.device)
            loss = operators.loss(replaced(given, inputs), LINES["scl"])
            assert (loss.shape, loss.dtype) == ((), torch.float32)


@pytest.mark.parametrize("argument", ["rows", "columns", "row_keys", "column_keys", "own_column", "bias"])
def test_fake_tensors_among_real_ones_are_refused(device, argument):
    """An error by PyTorch, which mixes them in no operator; never an address of nothing."""
    pairs, _ = leaves(CROSS, device)
    mixed = pairs._replace(**{argument: FakeTensorMode().from_tensor(getattr(pairs, argument))})
    with pytest.raises((AssertionError, RuntimeError, TypeError, NotImplementedError), match=r"[Ff]ake"):
        operators.terms(mixed, ALL)


DTENSOR = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from fastsupcon import operators
from fastsupcon.problem import Line, Pairs
dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"tcp://127.0.0.1:{sys.argv[1]}")
mesh = init_device_mesh("cpu", (1,))
rows, keys = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 4
spread = lambda x: distribute_tensor(x.detach(), mesh, [Shard(0)])
for pairs in (Pairs(spread(rows), row_keys=keys), Pairs(rows, row_keys=spread(keys)), Pairs(spread(rows), row_keys=spread(keys))):
    for call in (lambda: operators.terms(pairs, ("all",)), lambda: operators.loss(pairs, Line(all=1, similarity=-1))):
        try:
            call()
        except (TypeError, NotImplementedError, ValueError, RuntimeError) as error:
            print("refused:", type(error).__name__, str(error)[:200].replace(chr(10), " "))
        else:
            print("served")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_distributed_tensors_are_refused_and_crash_nothing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", DTENSOR, port], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("refused:") == 6, run.stdout


# --- transforms ------------------------------------------------------------------------------------------------------------------------


@CASES
def test_func_grad(backend, device, case):
    pairs, tensors = leaves(case, device)
    _, *want = step_of(case, pairs, backend)(*tensors)
    every = tuple(range(len(tensors)))
    got = torch.func.grad(lambda *tensors: total(replaced(pairs, tensors), case, backend), argnums=every)(*(x.detach() for x in tensors))
    agree(got, want)


@pytest.mark.parametrize("line", LINES)
def test_func_grad_of_a_loss_and_of_its_gradient(backend, device, line):
    pairs, (rows,) = leaves(replace(SELF, n=12), device)

    def loss(rows, reduction="sum"):
        return operators.loss(pairs._replace(rows=rows), LINES[line]._replace(reduction=reduction), backend=backend)

    plain = rows.detach()
    (want,) = torch.autograd.grad(loss(rows), rows, create_graph=True)
    (second,) = torch.autograd.grad(want.square().sum(), rows)
    agree((torch.func.grad(loss)(plain),), (want,))
    agree((torch.func.grad(lambda rows: torch.func.grad(loss)(rows).square().sum())(plain),), (second,))
    agree((torch.func.jacrev(lambda rows: loss(rows, "none"))(plain).sum(0),), (want,))


def test_vmap(backend, device):
    """Problems of one shape, each with its keys, and their gradients, however these are asked for."""
    pairs, (rows,) = leaves(SELF, device)
    many = torch.stack([rows.detach(), 2 * rows.detach().flip(0), rows.detach().roll(1, 1)]).requires_grad_()
    keys = torch.stack([pairs.row_keys, pairs.row_keys.flip(0), pairs.row_keys % 2])

    def loss(rows, keys):
        return operators.loss(pairs._replace(rows=rows, row_keys=keys), LINES["scl"], backend=backend)

    want = torch.stack([loss(*one) for one in zip(many, keys, strict=True)])
    (gradients,) = torch.autograd.grad(want.sum(), many)
    of_each = torch.func.vmap(loss)(many, keys)
    agree((of_each, *torch.autograd.grad(of_each.sum(), many)), (want, gradients))
    agree((torch.func.vmap(torch.func.grad(loss))(many.detach(), keys),), (gradients,))
    agree(
        (torch.func.grad(lambda x: torch.func.vmap(loss, in_dims=(2, 0))(x, keys).sum())(many.detach().movedim(0, 2)).movedim(2, 0),),
        (gradients,),
    )
    agree((torch.func.vmap(loss, in_dims=(None, 0))(rows.detach(), keys)[1:2],), (loss(rows, keys[1])[None],))


def test_batched_gradients(backend, device):
    pairs, (rows,) = leaves(SELF, device)
    line = LINES["scl"]._replace(reduction="none")
    for values in (operators.loss(pairs, line, backend=backend), operators.terms(pairs, SCL, backend=backend)[0][0]):
        directions = torch.eye(9, dtype=values.dtype, device=device)
        (got,) = torch.autograd.grad(values, rows, directions, is_grads_batched=True, retain_graph=True)
        agree((got,), (torch.stack([torch.autograd.grad(values, rows, one, retain_graph=True)[0] for one in directions]),))


def test_jit_is_refused(backend, device):
    """A trace would keep the loss of the rows that it was made with."""
    pairs, (rows,) = leaves(SELF, device)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace cannot record .* torch\.export"):
        torch.jit.trace(lambda rows: operators.loss(pairs._replace(rows=rows), LINES["scl"], backend=backend), rows.detach())


def test_forward_mode_is_refused(backend, device):
    pairs, (rows,) = leaves(SELF, device)

    def loss(rows):
        return operators.loss(pairs._replace(rows=rows), LINES["scl"], backend=backend)

    plain = rows.detach()
    with pytest.raises(NotImplementedError, match=r"fastsupcon.*forward mode.*jacrev"):
        torch.func.jvp(loss, (plain,), (plain,))
    with pytest.raises(NotImplementedError, match=r"fastsupcon.*forward mode"), torch.autograd.forward_ad.dual_level():
        loss(torch.autograd.forward_ad.make_dual(plain, plain))


# --- GPU -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@CASES
def test_capture_into_a_cuda_graph(backend, device, case):
    """Forward and backward, and a scale that changes between replays: nothing waits for the device, nothing is read from it."""
    pairs, tensors = leaves(case, device)
    step = step_of(case, pairs, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors)
    with torch.no_grad():
        for x in tensors:
            x.mul_(1.25)
    graph.replay()
    agree(captured, step(*tensors))
