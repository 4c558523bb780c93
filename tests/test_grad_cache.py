"""grad_cache against the direct computation over the same chunks: values, every gradient, and the state that is left behind."""

import contextlib
import copy
import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from fastsupcon import InfoNCELoss, PSCLoss, SupConLoss, grad_cache

ROWS, WIDTH = 22, 12  # chunks of 8, 8 and 6
LABELS = torch.arange(ROWS) % 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def direct(encoder, *inputs, chunk, **options):
    """The same function in one graph. Outputs of the chunks are joined leaf by leaf."""

    def rows(i):
        return lambda x: x[i : i + chunk] if isinstance(x, torch.Tensor) and x.ndim else x

    count = next(len(x) for x in torch.utils._pytree.tree_leaves((inputs, options)) if isinstance(x, torch.Tensor) and x.ndim)
    parts = [encoder(*tree_map(rows(i), inputs), **tree_map(rows(i), options)) for i in range(0, count, chunk)]
    return tree_map(lambda *z: torch.cat(z), *parts)


def mlp(dtype=torch.float64, dropout=0.0, norm=False):
    layers = [nn.Linear(WIDTH, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8)]
    return nn.Sequential(*layers).to(dtype)


def learned_loss(dtype=torch.float64):
    """With two parameters of its own."""
    return PSCLoss(4, 8, temperature=nn.Parameter(torch.tensor(0.2, dtype=dtype))).to(dtype)


def supcon(z):
    return SupConLoss(0.2, normalize=True)(z, LABELS)


def outcome(embed, module, step, backward=torch.Tensor.backward):
    """Of one step on a copy of ``module``: the loss, every gradient, every buffer and the next random number."""
    module = copy.deepcopy(module)
    torch.manual_seed(1)
    loss = step(functools.partial(embed, chunk=8), module)
    backward(loss)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"loss": loss.detach(), "grads": grads, "buffers": dict(module.named_buffers()), "random": torch.rand(3)}


def assert_exact(module, step, tolerance=1e-10, backward=torch.Tensor.backward):
    got, want = (outcome(embed, module, step, backward) for embed in (grad_cache, direct))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert any(grad is not None for grad in got["grads"].values())
    return got


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_exact(dtype, dropout):
    """With a learned loss and a second term beside it."""
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    module = nn.ModuleDict({"encoder": mlp(dtype, dropout), "loss": learned_loss(dtype), "head": nn.Linear(8, 4).to(dtype)})

    def step(embed, m):
        z = embed(m["encoder"], x)
        return m["loss"](z, LABELS) + 0.3 * F.cross_entropy(m["head"](z), LABELS) + supcon(z)

    got = assert_exact(module, step, TOLERANCE[dtype])
    assert all(grad is not None for grad in got["grads"].values())


def test_against_the_whole_batch():
    """Without what depends on the chunk, the chunk does not matter."""
    x, module = torch.randn(ROWS, WIDTH, dtype=torch.float64), mlp()
    want = outcome(lambda encoder, x, chunk: encoder(x), module, lambda embed, m: supcon(embed(m, x)))
    for chunk in (1, 5, ROWS, 100):
        got = outcome(
            lambda encoder, x, chunk, size=chunk: grad_cache(encoder, x, chunk=size), module, lambda embed, m: supcon(embed(m, x))
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_batch_norm_goes_on_once():
    """Statistics of each chunk, momentum over chunks, and buffers in the order of the first pass."""
    x, y = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    got = assert_exact(mlp(norm=True, dropout=0.2), lambda embed, m: supcon(embed(m, x)) + supcon(embed(m, y)))
    assert got["buffers"]["1.num_batches_tracked"] == 6


def test_batch_norm_beside_a_direct_call():
    """Whose graph keeps the buffers that the second pass rewinds."""
    x, y = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    assert_exact(mlp(norm=True), lambda embed, m: supcon(m(y)) + supcon(embed(m, x)))
    assert_exact(mlp(norm=True), lambda embed, m: supcon(embed(m, x)) + supcon(m(y)))


def test_power_iteration_goes_on_once():
    """The vectors of spectral_norm change in each forward, and with them the weight."""
    module = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 8))).double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    assert_exact(module, lambda embed, m: supcon(embed(m, x)))


def test_evaluation_mode():
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    assert_exact(mlp(norm=True, dropout=0.5).eval(), lambda embed, m: supcon(embed(m, x)))


def test_gradients_accumulate():
    x, y = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)

    def step(embed, m):
        supcon(embed(m, x)).backward()
        return supcon(embed(m, y))

    assert_exact(mlp(dropout=0.3), step)


def test_backward_twice():
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)

    def backward(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    assert_exact(mlp(dropout=0.3, norm=True), lambda embed, m: supcon(embed(m, x)), backward=backward)


def test_two_encoders():
    a, b = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    module = nn.ModuleDict({"image": mlp(dropout=0.2), "text": mlp()})
    clip = InfoNCELoss(0.2, symmetric=True, normalize=True)
    assert_exact(module, lambda embed, m: clip(embed(m["image"], a), embed(m["text"].forward, b)))


class _Nested(nn.Module):
    """Takes a dict, a tuple, options and numbers; gives a tuple in a dict, and integers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(dropout=0.3), mlp()

    def forward(self, batch, pair, *, gain, mode):
        assert mode == "both"
        z = self.a(batch["x"]) * gain
        return {"z": (z, self.b(pair[0] + pair[1])), "class": z.argmax(1)}


def test_nested_inputs_and_outputs():
    """Gradients also reach inputs that require them, cut or not."""
    a, b, c = torch.randn(3, ROWS, WIDTH, dtype=torch.float64)
    module = nn.ModuleDict(
        {"nested": _Nested(), "stem": nn.Linear(WIDTH, WIDTH).double(), "pre": nn.ParameterList([torch.tensor(0.1).double()])}
    )

    def step(embed, m):
        out = embed(m["nested"], {"x": m["stem"](a)}, (b, m["stem"](c)), gain=m["pre"][0].exp(), mode="both")
        assert out["class"].dtype == torch.int64 and not out["class"].requires_grad
        return InfoNCELoss(0.2, normalize=True)(*out["z"])

    got = assert_exact(module, step)
    assert all(grad is not None and grad.abs().max() > 0 for grad in got["grads"].values())


def test_outputs_that_the_loss_does_not_use():
    a, b, c = torch.randn(3, ROWS, WIDTH, dtype=torch.float64)
    got = assert_exact(_Nested(), lambda embed, m: supcon(embed(m, {"x": a}, (b, c), gain=2, mode="both")["z"][1]))
    assert got["grads"]["a.0.weight"] is None


@pytest.mark.parametrize("frozen", ["0", "4", "all but inputs"])
def test_frozen_parts(frozen):
    module, x = nn.ModuleList([mlp(), nn.Linear(WIDTH, WIDTH).double()]), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    (module[0] if frozen == "all but inputs" else module[0].get_submodule(frozen)).requires_grad_(False)
    assert_exact(module, lambda embed, m: supcon(embed(m[0], m[1](x))))


def test_a_frozen_tower_of_a_module_that_learns():
    """What comes out requires a gradient, for which the second pass finds no use."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = mlp().requires_grad_(False), mlp()

        def encode_image(self, x):
            return self.image(x)

    a, b = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    clip = InfoNCELoss(0.2, normalize=True)
    got = assert_exact(Towers(), lambda embed, m: clip(embed(m.encode_image, a), embed(m.text, b)))
    assert got["grads"]["image.0.weight"] is None


def test_without_graph():
    x, module = torch.randn(ROWS, WIDTH), mlp(torch.float32)
    with torch.no_grad():
        assert not grad_cache(module, x, chunk=8).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(grad_cache(module, x.clone(), chunk=8), module(x))
    assert not grad_cache(module.requires_grad_(False), x, chunk=8).requires_grad
    torch.testing.assert_close(grad_cache(module, x, chunk=8), module(x))


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH).double(), mlp(dropout=0.4)

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    assert_exact(Checkpointed(), lambda embed, m: supcon(embed(m, x)))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    """A direct call after it, in the same region, finds no weights that were cast without a graph.

    Where the casts are cached, the direct computation sums the gradients of its chunks in bfloat16; grad_cache sums them in float32.
    """
    x, y = torch.randn(2, ROWS, WIDTH)

    def step(embed, m):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=embed.func is grad_cache):
            z = embed(m, x)
            assert z.dtype == torch.bfloat16
            loss = supcon(z) + supcon(m(y))
            if backward_inside:
                loss.backward(retain_graph=True)
            return loss

    assert_exact(mlp(torch.float32, dropout=0.3), step, 1e-5)


def test_scaler():
    """Scaled losses give scaled gradients; an infinite one is found, and the step is left out."""
    x, scaler = torch.randn(ROWS, WIDTH), torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_exact(mlp(torch.float32), lambda embed, m: supcon(embed(m, x)), 1e-3, backward=lambda loss: scaler.scale(loss).backward())
    for value, moves in ((1.0, True), (torch.inf, False)):
        module = mlp(torch.float32)
        before, optimizer = copy.deepcopy(module.state_dict()), torch.optim.SGD(module.parameters(), lr=0.1)
        scaler.scale(supcon(grad_cache(module, x, chunk=8)) * value).backward()
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(before[name], p) for name, p in module.state_dict().items()) == moves


@pytest.mark.long
def test_compiled_encoder():
    """Its random numbers are the compiler's, and repeat too."""
    x, compiled = torch.randn(16, WIDTH), torch.compile(mlp(torch.float32, dropout=0.5))
    for embed in (grad_cache, direct):
        torch.manual_seed(1)
        loss = SupConLoss(0.2, normalize=True)(embed(compiled, x, chunk=8), LABELS[:16])
        loss.backward()
        grads = [p.grad.clone() for p in compiled.parameters()]
        compiled.zero_grad()
        if embed is grad_cache:
            first = loss.detach(), grads
    torch.testing.assert_close(first, (loss.detach(), grads), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu():
    """The device's generator is kept as well, and its autocast."""
    x, labels = torch.randn(ROWS, WIDTH, device="cuda"), LABELS.cuda()

    def step(embed, m):
        with torch.autocast("cuda", torch.bfloat16):
            return SupConLoss(0.2, normalize=True)(embed(m, x), labels)

    assert_exact(mlp(torch.float32, dropout=0.5, norm=True).cuda(), step, 1e-5)


def peak_of_saved_bytes(step, module):
    """Most bytes that graphs keep at once, parameters not counted."""
    held, live, peak, parameters = {}, 0, 0, {p.data_ptr() for p in module.parameters()}

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def let_go(key, size):
        nonlocal live
        held[key] -= 1
        if not held[key]:
            live -= size

    def pack(x):
        nonlocal live, peak
        kept, storage = Kept(x), x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in parameters:
            return kept
        held[key] = held.get(key, 0) + 1
        if held[key] == 1:
            live += size
            peak = max(peak, live)
        weakref.finalize(kept, let_go, key, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        step()
    return peak


def test_activations_fall_with_the_chunk():
    rows, width = 256, 32
    encoder = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(width, width), nn.GELU())), nn.Linear(width, 4))
    x = torch.randn(rows, width)

    def held(embed):
        return peak_of_saved_bytes(lambda: embed(encoder, x).square().sum().backward(), encoder)

    whole = held(lambda encoder, x: encoder(x))
    assert whole > 30 * x.nbytes
    for chunk in (16, 64):
        cached = held(functools.partial(grad_cache, chunk=chunk))
        assert cached <= whole * chunk / rows + 1.5 * x.nbytes  # the batch itself and its embeddings


def test_errors_name_what_came():
    module, x = mlp(torch.float32), torch.randn(ROWS, WIDTH)
    with pytest.raises(TypeError, match=r"encoder must be an nn\.Module or a method of one, got function"):
        grad_cache(lambda x: module(x), x, chunk=8)
    with pytest.raises(ValueError, match="chunk must be an int of at least 1, got 0"):
        grad_cache(module, x, chunk=0)
    with pytest.raises(ValueError, match="inputs must be tensors of one number of rows, got 21 and 22"):
        grad_cache(module, x, x[1:], chunk=8)
    with pytest.raises(ValueError, match="inputs must be tensors of one number of rows, got no tensor with rows"):
        grad_cache(module, torch.tensor(1.0), chunk=8)
    with pytest.raises(ValueError, match=r"a row for each of the 8 that it takes, got a tensor of shape \[1, 8, 12\]"):
        grad_cache(nn.Unflatten(0, (1, -1)), x, chunk=8)
    with pytest.raises(ValueError, match="encoder must not write to its inputs"):
        grad_cache(nn.ReLU(inplace=True), x.clone(), chunk=8)
    with pytest.raises(ValueError, match="a row for each of the 8 that it takes, got NoneType"):
        grad_cache(nn.MultiheadAttention(WIDTH, 1), x, x, x, need_weights=False, chunk=8)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_derivatives_that_are_refused():
    module, x = mlp(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(supcon(grad_cache(module, x, chunk=8)), list(module.parameters()))
    with pytest.raises(RuntimeError, match=r"not torch\.autograd\.grad"):
        torch.autograd.grad(supcon(grad_cache(module, x.requires_grad_(), chunk=8)), x)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        supcon(grad_cache(module, x.requires_grad_(), chunk=8)).backward(create_graph=True)
        x.grad.sum().backward()
    loss = supcon(grad_cache(module, x.detach(), chunk=8))
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="must not be changed in place"):
        loss.backward()


def test_an_encoder_that_fails_leaves_the_state():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            if torch.is_grad_enabled() and len(x) < 8:
                raise ArithmeticError("the last chunk, in the second pass")
            return self.norm(x)

    module = Fails()
    loss = supcon(grad_cache(module, torch.randn(ROWS, WIDTH), chunk=8))
    want, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        loss.backward()
    torch.testing.assert_close(module.state_dict(), want, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


# Two processes. A case: rows of each, options of DistributedDataParallel, and how a step is made.
CASES = {
    "uneven": ((22, 9), {}),
    "no rows": ((22, 0), {}),
    "dropout and batch norm": ((22, 14), {"dropout": 0.5, "norm": True}),
    "find_unused_parameters": ((22, 9), {"find_unused_parameters": True}),
    "gradient_as_bucket_view": ((22, 9), {"gradient_as_bucket_view": True}),
    "learned loss": ((22, 9), {"loss": "learned"}),
    "accumulated": ((22, 9), {"steps": 2}),
    "two calls": ((22, 9), {"calls": 2}),
    "fully_shard": ((22, 17), {}),
}
SHARDS = hasattr(torch.cpu.Stream(), "record_event")  # in torch 2.6, fully_shard needs an accelerator


def problem(rows, rank, dropout=0.0, norm=False, loss="supcon", **_):
    """The same parameters in all processes, each with rows and random numbers of its own."""
    torch.manual_seed(0)
    module, criterion = mlp(dropout=dropout, norm=norm), learned_loss() if loss == "learned" else SupConLoss(0.2, normalize=True)
    torch.manual_seed(1 + rank)
    x, labels = torch.randn(rows[rank], WIDTH, dtype=torch.float64), LABELS[: rows[rank]]
    return module, criterion, x, (lambda z, criterion=criterion: criterion(z, labels) if len(z) else z.sum())


def gradients(module):
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]


def of_rank(rank, group):
    """What a process of the pool does (work_of_ranks.py)."""
    done = {}
    for name, (rows, options) in CASES.items():
        if name == "fully_shard" and not SHARDS:
            continue
        module, criterion, x, loss = problem(rows, rank, **options)
        reductions = []
        if name == "fully_shard":
            mesh = DeviceMesh.from_group(group, "cpu")
            for part in (module[0], module[4], module):
                fully_shard(part, mesh=mesh)
            encoder = module
        else:
            kept = {key: options[key] for key in ("find_unused_parameters", "gradient_as_bucket_view") if key in options}
            encoder = DistributedDataParallel(module, process_group=group, **kept)
            encoder.register_comm_hook(None, lambda _, bucket, seen=reductions: (seen.append(1), allreduce_hook(group, bucket))[1])
        if options.get("loss") == "learned":
            wrapped = DistributedDataParallel(criterion, process_group=group)
            loss = functools.partial(loss, criterion=wrapped)
        steps, calls = options.get("steps", 1), options.get("calls", 1)
        for _ in range(2):  # the second iteration has other buckets
            encoder.zero_grad()
            criterion.zero_grad()
            for step in range(steps):
                with encoder.no_sync() if step < steps - 1 else contextlib.nullcontext():
                    total = sum(loss(grad_cache(encoder, x, chunk=8)) for _ in range(calls))
                total.backward()
        found = [grad.numpy() for grad in gradients(module) + gradients(criterion)]
        done[name] = {"gradients": found, "reductions": len(reductions)}
    try:
        grad_cache(DistributedDataParallel(mlp(), process_group=group, static_graph=True), x, chunk=8)
    except ValueError as error:
        done["static_graph"] = str(error)
    return done


@pytest.fixture(scope="module")
def of_processes(pool):
    return pool.results("grad_cached", 2)


@pytest.mark.parametrize("name", CASES)
def test_across_processes(name, of_processes):
    """The mean over the processes of what each computes directly."""
    if name == "fully_shard" and not SHARDS:
        pytest.skip(f"fully_shard of torch {torch.__version__} does not run on a CPU")
    rows, options = CASES[name]
    sums = []
    for rank in range(2):
        module, criterion, x, loss = problem(rows, rank, **options)
        for _ in range(2):
            module.zero_grad()
            criterion.zero_grad()
            for _ in range(options.get("steps", 1) * options.get("calls", 1)):
                loss(direct(module, x, chunk=8) if len(x) else module(x)).backward()
        sums.append(gradients(module) + gradients(criterion))
    want = [(a + b) / 2 for a, b in zip(*sums, strict=True)]
    for rank in range(2):
        got = [torch.from_numpy(grad) for grad in of_processes[rank][name]["gradients"]]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if name != "fully_shard":
        assert of_processes[0][name]["reductions"] == 2 * options.get("calls", 1)  # one bucket in each of two iterations


def test_a_static_graph_is_refused(of_processes):
    assert "static_graph=True" in of_processes[0]["static_graph"]
