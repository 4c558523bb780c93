"""The operators inside PyTorch: opcheck, gradcheck on the compiled kernel, torch.compile, autocast, partial gradients, strides, bits."""

import pytest
import torch
from conftest import serves
from torch.library import opcheck

from fastsupcon import PSCLoss, SupConLoss, functional, rows

ops = torch.ops.fastsupcon
EXCLUSIONS = ["none", "skip", "labels"]


def normal(*shape, device, dtype=torch.float32, **options):
    return torch.randn(*shape, device=device, dtype=dtype, **options)


def exclusion(rule, rows, columns, device):
    """(skip, row_labels, column_labels) of the cross op."""
    if rule == "skip":
        return torch.randint(-1, columns, (rows,), device=device), None, None
    if rule == "labels":
        return None, torch.randint(0, 4, (rows,), device=device), torch.randint(0, 5, (columns,), device=device)
    return None, None, None


# --- the contract with torch.library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_self(backend, device, dtype):
    z, scale = normal(9, 5, device=device, dtype=dtype), 0.5
    lse, grad = ops.self_lse(z, scale, False, backend), normal(9, device=device)
    opcheck(ops.self_lse.default, (z, scale, False, backend))
    opcheck(ops.self_lse_backward.default, (z, lse, grad, scale, False, backend))


@pytest.mark.parametrize("rule", EXCLUSIONS)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_opcheck_cross(backend, device, rule, needs):
    a, b, bias = normal(6, 5, device=device), normal(7, 5, device=device), normal(7, device=device)
    problem = (a, b, bias, *exclusion(rule, 6, 7, device))
    lse, grad = ops.cross_lse(*problem, 0.5, backend), normal(6, device=device)
    opcheck(ops.cross_lse.default, (*problem, 0.5, backend))
    opcheck(ops.cross_lse_backward.default, (*problem, lse, grad, 0.5, needs, backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_sum_rows(device, dtype):
    opcheck(ops.sum_rows.default, (normal(9, 5, device=device, dtype=dtype), torch.randint(0, 4, (9,), device=device), 4))


@pytest.mark.skipif(rows.extension_missing is not None, reason=str(rows.extension_missing))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_row_helpers(dtype):
    z, table, ids = normal(9, 5, device="cpu", dtype=dtype), normal(4, 5, device="cpu", dtype=dtype), torch.randint(0, 4, (9,))
    unit, norm = ops.unit_rows(z)
    dots, sums = ops.dots_with_others(z, ids, 4, norm)
    opcheck(ops.unit_rows.default, (z,))
    opcheck(ops.unit_rows_backward.default, (unit, norm, z))
    opcheck(ops.dots_with_others.default, (z, ids, 4, norm))
    opcheck(ops.dots_with_others_backward.default, (z, ids, norm, sums, dots, z))
    opcheck(ops.row_dots.default, (z, table, ids))
    opcheck(ops.row_dots_backward.default, (z, table, ids, dots, z))


# --- gradients -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("scale", [1.0, 200.0])  # fixed shift and running maximum
def test_gradcheck_self(name, device, scale):
    if not serves(name, torch.float64, 3):
        pytest.skip(f"{name} does not serve float64 here")
    z = normal(7, 3, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: functional.self_logsumexp(z / scale**0.5, scale=scale, backend=name), z)


@pytest.mark.parametrize("name", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("rule", EXCLUSIONS)
def test_gradcheck_cross(name, device, rule):
    if not serves(name, torch.float64, 3):
        pytest.skip(f"{name} does not serve float64 here")
    wide = {"device": device, "dtype": torch.float64, "requires_grad": True}
    a, b, bias = normal(5, 3, **wide), normal(6, 3, **wide), normal(6, **wide)
    skip, row_labels, column_labels = exclusion(rule, 5, 6, device)

    def lse(a, b, bias):
        options = {"skip": skip, "row_labels": row_labels, "column_labels": column_labels, "backend": name}
        return functional.cross_logsumexp(a, b, scale=0.7, bias=bias, **options)

    assert torch.autograd.gradcheck(lse, (a, b, bias))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_losses(device, normalize):
    """Whole losses in float64 on the fastest backend, through the normalisation, both kinds of positives and a learned temperature."""
    wide = {"device": device, "dtype": torch.float64, "requires_grad": True}
    features, prototypes = normal(4, 2, 3, **wide), normal(6, 3, **wide)
    temperature = torch.tensor(0.4, **wide)
    labels, mask = torch.tensor([0, 1, 0, 2], device=device), torch.rand(4, 4, device=device)

    def supcon(z, t):
        return functional.supcon_loss(z, labels, temperature=t, normalize=normalize, reduction="none")

    def soft(z):
        return functional.supcon_loss(z, mask=mask, temperature=0.4, normalize=normalize, contrast_mode="one", reduction="none")

    def psc(z, p, t):
        return functional.psc_loss(z[:, 0], labels, p, temperature=t, normalize=normalize, reduction="none")

    assert torch.autograd.gradcheck(supcon, (features, temperature))
    assert torch.autograd.gradcheck(soft, (features,))
    assert torch.autograd.gradcheck(psc, (features, prototypes, temperature))


@pytest.mark.parametrize("wanted", ["a", "b", "bias"])
def test_one_gradient_alone_equals_the_one_among_all(backend, device, wanted):
    tensors = {"a": normal(9, 5, device=device), "b": normal(11, 5, device=device), "bias": normal(11, device=device)}
    weights = normal(9, device=device)

    def gradient(names):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
        lse = functional.cross_logsumexp(leaves["a"], leaves["b"], bias=leaves["bias"], scale=0.5, backend=backend)
        (lse * weights).sum().backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [name for name in leaves if name in names]
        return leaves[wanted].grad

    torch.testing.assert_close(gradient({wanted}), gradient(set(tensors)), rtol=1e-6, atol=1e-7)


def test_losses_without_any_gradient(backend, device):
    features, labels = normal(8, 4, device=device), torch.arange(8, device=device) % 3
    assert not functional.supcon_loss(features, labels, backend=backend).requires_grad
    with torch.no_grad():
        psc = PSCLoss(3, 4, backend=backend).to(device)
        assert not psc(features, labels).requires_grad


# --- torch.compile, autocast, strides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["supcon", "supcon one", "mask", "psc", "mpsc"])
def test_compile_fullgraph_forward_and_backward(device, loss):
    features, labels = normal(12, 2, 8, device=device), torch.arange(12, device=device) % 3
    if "psc" in loss:
        module = PSCLoss(3, 8, prototypes_per_class=2 if loss == "mpsc" else 1).to(device)
        inputs = (features[:, 0], labels)
    else:
        module = SupConLoss(0.1, "one" if "one" in loss else "all", 0.1, normalize=True)
        inputs = (features, None, torch.rand(12, 12, device=device)) if loss == "mask" else (features, labels)

    def step(function):
        leaf = inputs[0].detach().requires_grad_()
        value = function(leaf, *inputs[1:])
        return value, *torch.autograd.grad(value, (leaf, *module.parameters()))

    torch._dynamo.reset()
    for compiled, eager in zip(step(torch.compile(module, fullgraph=True, backend="aot_eager")), step(module), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compile_with_a_shape_that_changes(device):
    torch._dynamo.reset()
    compiled = torch.compile(functional.supcon_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 33):
        features, labels = normal(n, 8, device=device), torch.arange(n, device=device) % 2
        torch.testing.assert_close(compiled(features, labels), functional.supcon_loss(features, labels))


def test_autocast_leaves_the_loss_alone(backend, device):
    """Features that come out of an autocast layer are halves; the loss is in fp32, and the same as outside of autocast."""
    layer, x = torch.nn.Linear(6, 4, device=device), normal(10, 6, device=device)
    labels = torch.arange(10, device=device) % 3
    with torch.autocast(device.type, dtype=torch.bfloat16):
        features = layer(x)
        inside = functional.supcon_loss(features, labels, normalize=True, temperature=0.1, backend=backend)
        prototype_loss = functional.psc_loss(features, labels, normal(3, 4, device=device), backend=backend)
    assert features.dtype == torch.bfloat16
    assert inside.dtype == prototype_loss.dtype == torch.float32
    outside = functional.supcon_loss(features, labels, normalize=True, temperature=0.1, backend=backend)
    assert torch.equal(inside, outside)
    (inside + prototype_loss).backward()
    assert layer.weight.grad.isfinite().all()


def test_autocast_around_everything_changes_no_bit(backend, device):
    """The primitive and both backward passes inside of autocast, as where a user wraps the whole step."""
    z, labels, p = normal(70, 6, device=device), torch.arange(70, device=device) % 3, normal(3, 6, device=device)

    def step():
        leaves = [z.clone().requires_grad_(), p.clone().requires_grad_()]
        value = functional.supcon_loss(leaves[0], labels, normalize=True, temperature=0.1, backend=backend)
        value = value + functional.psc_loss(leaves[0], labels, leaves[1], temperature=0.1, backend=backend)
        value = value + functional.self_logsumexp(leaves[0], backend=backend).sum()
        value = value + functional.cross_logsumexp(leaves[0], leaves[1], backend=backend).sum()
        return value.detach(), *torch.autograd.grad(value, leaves)

    outside = step()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = step()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_input_of_any_strides(backend, device):
    labels = torch.arange(9, device=device) % 3
    base = normal(9, 5, device=device)
    layouts = {
        "transposed": base.t().contiguous().t(),
        "strided": torch.stack([base, base], 2).flatten(1)[:, ::2],
        "expanded": base[:1].expand(9, 5),
    }
    for layout, features in layouts.items():
        plain = features.contiguous()
        assert layout == "strided" or not features.is_contiguous()
        for loss in (
            lambda z: functional.supcon_loss(z, labels, temperature=0.3, backend=backend),
            lambda z: functional.psc_loss(z, labels, z[:3], backend=backend),
            lambda z: functional.cross_logsumexp(z, z[::2], bias=z[::2, 1], skip=labels, backend=backend).sum(),
        ):
            mine, expected = (rows.detach().requires_grad_() for rows in (features, plain))
            ours, theirs = loss(mine), loss(expected)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(torch.autograd.grad(ours, mine), torch.autograd.grad(theirs, expected))
    features = normal(9, 5, device=device, requires_grad=True)
    functional.supcon_loss(features, labels, reduction="none", backend=backend)[0].backward()  # an incoming gradient with stride 0
    features.grad = None
    functional.supcon_loss(features, labels, reduction="none", backend=backend).sum().backward()
    assert features.grad.isfinite().all()


# --- the same bits -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(backend, device, dtype):
    if not serves(backend, dtype, 32):
        pytest.skip(f"{backend} does not serve {dtype}")
    n = 150 if backend == "triton" and device.type == "cpu" else 700  # in its interpreter Triton is slow
    features = normal(n, 32, device=device).to(dtype)
    prototypes = normal(40, 32, device=device).to(dtype)
    labels = torch.randint(0, 40, (n,), device=device)

    def step():
        z, p = features.detach().requires_grad_(), prototypes.detach().requires_grad_()
        supcon = functional.supcon_loss(z, labels, normalize=True, temperature=0.1, backend=backend)
        psc = functional.psc_loss(z, labels, p, backend=backend)
        return supcon.detach(), psc.detach(), *torch.autograd.grad(supcon + psc, (z, p))

    first = step()
    for again in (step(), step()):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if backend == "cpu":  # plain PyTorch's products promise this for no number of threads
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(x, y) for x, y in zip(first, step(), strict=True)), count
        finally:
            torch.set_num_threads(threads)


def test_unit_rows_and_class_sums_have_gradients_of_their_own(device):
    """rows.py: |u| = 1, zeros stay zero, and both gradients are exact in float64."""
    x = normal(6, 4, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rows.unit_rows, x)
    ids, weight = torch.tensor([2, 0, 2, 2, 3, 0], device=device), torch.rand(6, device=device, dtype=torch.float64)
    table = normal(4, 4, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rows.dots_with_others(x, ids, 4, weight), x)
    assert torch.autograd.gradcheck(lambda x, table: rows.row_dots(x, table, ids), (x, table))
