"""Every loss of the table (table.py) against the textbook in float64; inside PyTorch: compile, autocast, strides, bits."""

import importlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICE, serves
from table import LOSSES
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastsupcon
from fastsupcon import PSCLoss, SupConLoss, functional

losses = pytest.mark.parametrize("name", list(LOSSES))
#: What the sums are made in, plus the rounding of a gradient to its dtype, relative to the largest entry.
# In half a precision a pair's weight and the gradient are both rounded: by half an ulp each, and terms of a sum cancel.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def step(loss, inputs, **options):
    """The loss, and its gradients with an uneven incoming one."""
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    value = loss(*inputs, **options)
    weights = torch.linspace(0.5, 1.5, value.numel(), device=value.device).reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


PLAIN = ("scl", "scl one", "scl mask", "psc", "mpsc", "infonce")  # each way to go from the operator to a loss


def spare_the_interpreter(backend, name, dtype=None):
    """What a loss adds in PyTorch to the operator's quantities is the same on every backend, and the interpreter takes seconds a call."""
    if backend == "triton" and DEVICE.type == "cpu" and name not in PLAIN and dtype != torch.float32:
        pytest.skip("interpreted: the value and the gradient alone, in float32")


def wide(inputs):
    return tuple(x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x for x in inputs)


def assert_agrees(row, inputs, dtype, backend, **options):
    options = row.options | options
    value, gradients = step(row.ours, inputs, backend=backend, **options)
    expected, wide_gradients = step(row.naive, wide(inputs), **options)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    fine = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]  # rows of half a precision are not rounded again
    torch.testing.assert_close(value.double(), expected, rtol=fine, atol=fine)
    for gradient, want in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype
        error, largest = (gradient.double() - want).abs().max(), want.abs().max()
        assert error <= TOLERANCE[dtype] * largest + 10 * fine / max(1, value.numel()), (error, largest)


@losses
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("samples", "depth"), [(2, 3), (33, 65)])
def test_value_and_gradient(backend, device, name, dtype, samples, depth):
    if not serves(backend, dtype, depth):
        pytest.skip(f"{backend} does not serve {dtype}")
    spare_the_interpreter(backend, name, dtype)
    row = LOSSES[name]
    assert_agrees(row, row.on(samples, depth, device, dtype), dtype, backend)


@losses
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(backend, device, name, reduction):
    spare_the_interpreter(backend, name)
    row = LOSSES[name]
    inputs = row.on(9, 5, device, torch.float32)
    assert_agrees(row, inputs, torch.float32, backend, reduction=reduction)
    shape = row.ours(*inputs, **row.options, reduction=reduction, backend=backend).shape
    assert shape == ((row.naive(*inputs, **row.options, reduction=reduction)).shape if reduction == "none" else ())


@losses
@pytest.mark.parametrize("temperature", [10.0, 0.0229, 1e-3])
def test_temperatures(backend, device, name, temperature):
    spare_the_interpreter(backend, name)
    row = LOSSES[name]
    inputs = row.on(9, 6, device, torch.float32)

    def scaled(loss):
        return lambda *tensors, **options: loss(*tensors, **options) * temperature

    options = {key: value for key, value in row.options.items() if key != "temperature"} | {"temperature": temperature}
    value, gradients = step(scaled(row.ours), inputs, backend=backend, **options)
    expected, wide_gradients = step(scaled(row.naive), wide(inputs), **options)
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    for gradient, want in zip(gradients, wide_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=2e-5 * max(1, float(want.abs().max())))


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_learned_temperature_is_as_exact_as_a_fixed_one(backend, device, name, dtype):
    spare_the_interpreter(backend, name)
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    row = LOSSES[name]
    inputs = row.on(12, 5, device, dtype)
    options = {key: value for key, value in row.options.items() if key != "temperature"}
    learned = torch.tensor(0.13, device=device, requires_grad=True)
    exact = torch.tensor(learned.item(), device=device, dtype=torch.float64, requires_grad=True)
    value = row.ours(*inputs, temperature=learned, backend=backend, **options)
    fixed = row.ours(*inputs, temperature=learned.item(), backend=backend, **options)
    expected = row.naive(*wide(inputs), temperature=exact, **options)
    torch.testing.assert_close(value, fixed, rtol=2e-6, atol=2e-6)
    (got,) = torch.autograd.grad(value * 2.0**16, learned)  # as a gradient scaler has it: fp16 would overflow
    (want,) = torch.autograd.grad(expected * 2.0**16, exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("lone_anchors", ["zero", "skip", "error"])
@pytest.mark.parametrize("positives", ["labels", "mask", "soft mask"])
def test_supcon_options(backend, device, positives, contrast_mode, lone_anchors):
    row, samples = LOSSES["scl one"], 7
    features = row.on(samples, 8, device, torch.float32)[0]
    labels = mask = None
    if positives == "labels":
        labels = torch.tensor([5, -3, 5, 2**40, 2**40, 5, 0], device=device)
        labels = labels if lone_anchors != "error" else labels.abs().clamp_max(5) // 5
    else:
        mask = torch.rand(samples, samples, device=device)
        mask = mask.round() if positives == "mask" else mask
        mask.fill_diagonal_(1.0 if lone_anchors == "error" else 0.0)
    options = {"contrast_mode": contrast_mode, "lone_anchors": lone_anchors}
    assert_agrees(row, (features, labels, mask), torch.float32, backend, **options)


@pytest.mark.parametrize(("classes", "temperature", "minimum"), [(10, 1.0, 1.0861), (10, 0.1, -8.9139), (100, 0.1, -5.5059)])
def test_psc_minimum_is_at_the_simplex(backend, device, classes, temperature, minimum):
    """-(1/tau) (1 + 1/(C-1)) + log(C-1), where the prototypes are the vertices of a simplex and the anchors sit on them."""
    simplex = torch.eye(classes, device=device) - 1 / classes
    labels = torch.arange(classes, device=device)
    loss = functional.psc_loss(simplex, labels, simplex, temperature=temperature, backend=backend)
    assert loss.item() == pytest.approx(minimum, abs=1e-4)
    chance = functional.psc_loss(torch.zeros(4, 3, device=device), labels[:4], torch.zeros(classes, 3, device=device), backend=backend)
    assert chance.item() == pytest.approx(math.log(classes - 1), rel=1e-6)


def test_the_peers_definitions_differ_by_these_options(device):
    """Two lone anchors of twelve: SupContrast divides by all anchors, pytorch-metric-learning by those that have a positive."""
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5], device=device)
    features = torch.randn(12, 8, device=device)
    each = functional.supcon_loss(features, labels, temperature=0.1, normalize=True, reduction="none")
    assert torch.equal(each[10:], torch.zeros(2, device=device))
    supcontrast = functional.supcon_loss(features, labels, temperature=0.1, normalize=True)
    pml = functional.supcon_loss(features, labels, temperature=0.1, normalize=True, lone_anchors="skip")
    torch.testing.assert_close(supcontrast, each.sum() / 12)
    torch.testing.assert_close(pml, each.sum() / 10)


def test_a_row_is_no_positive_of_itself_whatever_the_diagonal_says(backend, device):
    z, weights = torch.randn(40, 6, device=device), torch.rand(40, 40, device=device)
    want = functional.supcon_loss(z, mask=weights.clone().fill_diagonal_(0), normalize=True, backend=backend)
    for diagonal in (1.0, 1e6, math.inf):
        mask = weights.clone().fill_diagonal_(diagonal)
        assert torch.equal(functional.supcon_loss(z, mask=mask, normalize=True, backend=backend), want)


@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
@pytest.mark.parametrize("views", [1, 2])
def test_the_least_weight_is_relative(backend, device, views, scale):
    """An anchor whose weights sum to a millionth of the largest of all has no positive; below that a float of a kernel is noise."""
    z, mask = torch.randn(8, views, 6, device=device), torch.rand(8, 8, device=device) + 0.5
    mask.fill_diagonal_(0)
    mask[3], mask[5] = 1e-8, 1e-6
    mask *= scale / mask.max()
    each = functional.supcon_loss(z, mask=mask, reduction="none", backend=backend).view(views, 8)
    assert (each == 0).sum(0).tolist() == [0, 0, 0, views, 0, 0, 0, 0]
    mask[3, 3] = math.inf  # no pair of one view; with two a weight that is none, which makes nobody lone
    each = functional.supcon_loss(z, mask=mask, reduction="none", backend=backend).view(views, 8)
    assert each[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all() and (each[:, 3] == 0).all() == (views == 1)


def test_a_long_row_costs_the_others_nothing(backend, device):
    z = torch.nn.functional.normalize(torch.randn(64, 16, device=device), dim=1)
    z[0] *= 1e6
    labels = torch.arange(64, device=device) // 2
    each = functional.supcon_loss(z, labels, temperature=1.0, reduction="none", backend=backend)
    want = LOSSES["scl"].naive(z.double(), labels, temperature=1.0, reduction="none")
    torch.testing.assert_close(each.double(), want, rtol=1e-5, atol=1e-5)


# --- modules ---------------------------------------------------------------------------------------------------------------------------


@losses
def test_modules_are_the_functions_with_their_options_held(device, name):
    row = LOSSES[name]
    inputs = row.on(8, 5, device, torch.float32)
    module = row.module(inputs)
    assert torch.equal(module(*row.held(inputs)), row.ours(*inputs, **row.options))
    for option, value in row.options.items():
        assert getattr(module, option) == value
        assert f"{option}={value!r}" in repr(module)


def test_module_defaults_and_prototypes(device):
    features, labels = torch.randn(8, 2, 5, device=device), torch.randint(0, 3, (8,), device=device)
    default = functional.supcon_loss(features, labels, temperature=0.07, base_temperature=0.07)
    torch.testing.assert_close(SupConLoss()(features, labels), default)
    psc = PSCLoss(3, 5, temperature=0.2, prototypes_per_class=2).to(device)
    assert [name for name, _ in psc.named_parameters()] == ["prototypes"]
    assert list(psc.state_dict()) == ["prototypes"]
    assert psc.prototypes.shape == (6, 5)
    z, p = (torch.nn.functional.normalize(rows, dim=1) for rows in (features[:, 0], psc.prototypes))
    torch.testing.assert_close(psc.logits(features[:, 0]), (z @ p.T / 0.2).exp().unflatten(1, (3, 2)).sum(2).log())
    learned = SupConLoss(torch.nn.Parameter(torch.tensor(0.1)), class_weights=torch.ones(3))
    assert [name for name, _ in learned.named_parameters()] == ["temperature"]
    assert "temperature=learned(0.1), " in repr(learned) and "class_weights=float32[3], " in repr(learned)
    assert "temperature=0.25, " in repr(SupConLoss(torch.tensor([0.25]))) and "temperature=0.25, " in repr(
        PSCLoss(3, 5, torch.tensor(0.25))
    )


def test_numbers_of_other_kinds(device):
    """NumPy's, and tensors of one element, of any real dtype; and a number of classes as ``labels.max() + 1`` gives it."""
    z, labels = torch.randn(8, 4, device=device), torch.arange(8, device=device) % 3
    want = functional.supcon_loss(z, labels, temperature=1.0)
    for one in (
        1,
        np.float32(1),
        np.int64(1),
        np.array(1.0),
        np.array([1.0]),
        torch.tensor(1),
        torch.ones(1, 1),
        torch.ones((), device=device),
    ):
        assert torch.equal(functional.supcon_loss(z, labels, temperature=one), want)
    for classes in (3, np.int64(3), labels.max() + 1):
        assert PSCLoss(classes, 4).prototypes.shape == (3, 4)
    for bad in (torch.tensor(3.0), torch.tensor([3]), 3.0, True):
        with pytest.raises(ValueError, match="num_classes must be an int of at least 2, got"):
            PSCLoss(bad, 4)


def test_jit_script_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot read .* torch\.export"):
        torch.jit.script(torch.nn.Sequential(PSCLoss(3, 4)))


def test_loading_anew():
    """The package may be reloaded; its operators stand in PyTorch once, and what would load them again says so."""
    assert importlib.reload(fastsupcon) is fastsupcon
    z = torch.randn(6, 4)
    assert torch.equal(fastsupcon.functional.supcon_loss(z, torch.arange(6) % 2), functional.supcon_loss(z, torch.arange(6) % 2))
    code = "import importlib, fastsupcon.operators; importlib.reload(fastsupcon.operators)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ImportError: fastsupcon's operators are loaded" in done.stderr


def test_prototypes_made_on_meta_and_filled_later(device):
    with torch.device("meta"):
        late = PSCLoss(3, 4, prototypes_per_class=2)
    late.to_empty(device=device).load_state_dict(PSCLoss(3, 4, prototypes_per_class=2).state_dict())
    assert late.classes.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_temperature_comes_back_from_the_meta_device(device):
    """A buffer that is not saved could not be loaded into what to_empty() makes."""
    loss = SupConLoss(temperature=torch.tensor(0.07)).to("meta").to_empty(device=device)
    assert loss.temperature.item() == torch.tensor(0.07).item() and loss.temperature.device.type == device.type


def test_half_temperatures_and_a_default_device(device):
    """The factor temperature / base_temperature is no half, and the loss no double; a default device is not that of the rows."""
    z, labels = torch.randn(8, 4, device=device), torch.arange(8, device=device) % 2
    half = torch.tensor(0.07, dtype=torch.bfloat16, device=device)
    for temperature in (half, half.double()):
        loss = functional.supcon_loss(z, labels, temperature=temperature, base_temperature=0.07, normalize=True)
        want = functional.supcon_loss(z, labels, temperature=float(half), base_temperature=0.07, normalize=True)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    want = functional.supcon_loss(z, labels)
    with torch.device("meta"):
        assert torch.equal(functional.supcon_loss(z, labels), want)


# --- inside PyTorch --------------------------------------------------------------------------------------------------------------------


@losses
def test_tracers_see_every_loss(device, name):
    """Checks of values are left to the device where values cannot be read: fake tensors, make_fx, also of a gradient by torch.func."""
    row = LOSSES[name]
    inputs = tuple(x if x is None else x.detach() for x in row.on(12, 5, device, torch.float32))

    def loss(*tensors):
        return row.ours(*tensors, **row.options)

    others = (inputs[0].flip(-1), *inputs[1:])
    for function in (loss, torch.func.grad(loss)):
        torch.testing.assert_close(make_fx(function)(*inputs)(*others), function(*others), rtol=1e-4, atol=1e-6)
    with FakeTensorMode() as mode:
        assert loss(*(x if x is None else mode.from_tensor(x) for x in inputs)).shape == ()
    with pytest.raises(NotImplementedError, match=r"fastsupcon.*forward mode"):
        torch.func.jvp(lambda rows: loss(rows, *inputs[1:]), inputs[:1], inputs[:1])


@losses
def test_compile_fullgraph_forward_and_backward(device, name):
    row = LOSSES[name]
    inputs = row.on(12, 8, device, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(row.ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, inputs, **row.options), step(row.ours, inputs, **row.options), rtol=1e-5, atol=1e-6)
    module = row.module(inputs)
    torch._dynamo.reset()
    held = row.held(inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*held), module(*held), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*PLAIN, "scl hard", "infonce keys", "bcl", "paco"])
def test_compile_with_a_shape_that_changes(device, name):
    row = LOSSES[name]
    torch._dynamo.reset()
    compiled = torch.compile(row.ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (6, 9, 33):
        inputs = row.on(samples, 8, device, torch.float32)
        torch.testing.assert_close(step(compiled, inputs, **row.options), step(row.ours, inputs, **row.options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["scl", "scl raw rows", "scl several", "psc", "bcl", "paco", "infonce", "ntxent"])
def test_compile_with_a_temperature_that_changes(device, name, compiler):
    """Twice at most, the second time for any number; and as an attribute of the module too. NumPy's numbers are tensors to the compiler."""
    if compiler == "inductor" and (device.type == "cpu") != (name == "scl raw rows"):
        pytest.skip("the one loss shows that Inductor keeps no old value; it compiles for seconds")
    row = LOSSES[name]
    inputs = row.on(12, 8, device, torch.float32)
    # It is Dynamo that compiles anew: once it has traced the function's gradient too, the module's value is enough.
    function, method = (CompileCounterWithBackend(each) for each in (compiler, "eager" if compiler == "aot_eager" else compiler))
    torch._dynamo.reset()
    compiled = torch.compile(row.ours, fullgraph=True, backend=function)
    for temperature in (0.5, 0.4, 0.3, 0.25, 0.2):
        options = row.options | {"temperature": temperature}
        torch.testing.assert_close(step(compiled, inputs, **options), step(row.ours, inputs, **options), rtol=1e-5, atol=1e-6)
    module, held = row.module(inputs), row.held(inputs)
    compiled = torch.compile(module, fullgraph=True, backend=method)
    for temperature in (0.5, 0.4, 0.3, 0.25, 0.2):
        module.temperature = temperature
        torch.testing.assert_close(compiled(*held), module(*held), rtol=1e-5, atol=1e-6)
    assert max(function.frame_count, method.frame_count) <= 2
    for temperature in (np.float64(0.25), np.float32(0.2)):
        module.temperature = temperature
        torch.testing.assert_close(compiled(*held), module(*held), rtol=1e-5, atol=1e-6)


@losses
def test_autocast_changes_no_bit(backend, device, name):
    spare_the_interpreter(backend, name)
    row = LOSSES[name]
    inputs = row.on(40, 6, device, torch.float32)
    outside = step(row.ours, inputs, **row.options, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = step(row.ours, inputs, **row.options, backend=backend)
    for x, y in zip((inside[0], *inside[1]), (outside[0], *outside[1]), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def strided(x):
    """The same values, not contiguous."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


@losses
def test_input_of_any_strides(backend, device, name):
    spare_the_interpreter(backend, name)
    row = LOSSES[name]
    inputs = row.on(9, 5, device, torch.float32)
    apart = tuple(x if x is None else strided(x.detach()).requires_grad_(x.requires_grad) for x in inputs)
    assert not apart[0].is_contiguous()
    torch.testing.assert_close(
        step(row.ours, apart, **row.options, backend=backend), step(row.ours, inputs, **row.options, backend=backend)
    )
    each = row.ours(*inputs, **row.options, reduction="none", backend=backend)
    each[0].backward()  # an incoming gradient that is expanded, with stride 0
    assert inputs[0].grad.isfinite().all()


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(backend, device, name, dtype):
    spare_the_interpreter(backend, name)
    if not serves(backend, dtype, 32):
        pytest.skip(f"{backend} does not serve {dtype}")
    row = LOSSES[name]
    # Few rows where there are no threads to share them: in Triton's interpreter, which is slow too, and in the plain products.
    few = device.type == "cpu" and backend != "cpu"
    inputs = row.on(60 if few else 500, 32, device, dtype)

    def bits():
        value, gradients = step(row.ours, inputs, **row.options, backend=backend)
        return value, *gradients

    first = bits()
    assert all(torch.equal(x, y) for x, y in zip(first, bits(), strict=True))
    if backend == "cpu" and name != "scl mask":  # plain PyTorch's products promise this for no number of threads
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(x, y) for x, y in zip(first, bits(), strict=True)), count
        finally:
            torch.set_num_threads(threads)


@losses
def test_a_second_backward_and_neighbours_leave_gradients_alone(device, name):
    row = LOSSES[name]
    inputs = row.on(24, 10, device, torch.float32)
    leaf = inputs[0]
    other = torch.randn_like(leaf, requires_grad=True)
    (alone,) = torch.autograd.grad(row.ours(*inputs, **row.options), leaf)
    y = leaf * 1
    total = row.ours(y, *inputs[1:], **row.options) + (y + other).square().sum()
    first = torch.autograd.grad(total, (leaf, other), retain_graph=True)
    again = torch.autograd.grad(total, (leaf, other))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    torch.testing.assert_close(first[0], alone + 2 * (leaf + other).detach())


@losses
def test_no_gradient_where_none_is_asked_for(backend, device, name):
    row = LOSSES[name]
    inputs = row.on(8, 4, device, torch.float32)
    with torch.no_grad():
        assert not row.ours(*inputs, **row.options, backend=backend).requires_grad
    frozen = (inputs[0], *(x if x is None else x.detach() for x in inputs[1:]))
    row.ours(*frozen, **row.options, backend=backend).backward()
    assert inputs[0].grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mpsc"])  # its gradient takes the affinities as constants
def test_gradcheck(device, name):
    """In float64 on the fastest backend, with the temperature's gradient; and second derivatives."""
    row = LOSSES[name]
    options = {key: value for key, value in row.options.items() if key != "temperature"}
    inputs = row.on(5, 3, device, torch.float64)
    inputs = tuple(x if k < 2 or x is None or name != "scl mask" else x.detach() for k, x in enumerate(inputs))  # no gradient of a mask
    temperature = torch.tensor(0.4, device=device, dtype=torch.float64, requires_grad=True)

    def loss(temperature, *inputs):
        return row.ours(*inputs, temperature=temperature, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, (temperature, *inputs))
    assert torch.autograd.gradgradcheck(loss, (temperature, *inputs))
