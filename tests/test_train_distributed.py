"""Training by torchrun: two processes against one, at equal batches. One start of torchrun, and a restart, serve all tests."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import checkpoint
import data as datasets
import hybrid
import processes
import settings
from augment import Augmentation, Draws
from hybrid import train
from run import Run
from settings import Config
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.processes import Script, warm

ROOT = Path(__file__).parents[1]
TINY = {
    "largest_class": 12, "imbalance": 4, "width": 4, "hidden": 16, "embedding": 8, "pictures": False,
    "device": "cpu", "threads": 1, "eval_every": 1, "backend": "chunked",
}  # fmt: skip
# Odd batches, of which the processes have uneven parts.
EPOCHS = {method: {"method": method, "epochs": 2, "batch": 27} for method in ("hybrid-sc", "hybrid-psc", "ce", "bcl")} | {
    "stages": {"schedule": "two-stage", "epochs": 3, "batch": 21, "classifier_batch": 11, "validation": 0.2, "ema": 0.9, "clip": 0.5},
    "crt": {"method": "crt", "switch_at": 0.5, "epochs": 2, "batch": 27},
    "fp16": {"precision": "fp16", "epochs": 1, "batch": 29, "method": "hybrid-mpsc", "sampler": "square-root", "logit_adjustment": 1.0},
    "paco": {"method": "paco", "epochs": 2, "batch": 27, "queue": 40},
    "reweighted": {"method": "ldam-drw", "epochs": 2, "batch": 27, "class_weights": 0.99, "reweight_from": 0.5},
}
METHODS = ("hybrid-sc", "hybrid-psc", "ce", "bcl", "paco", "gpaco", "ldam-drw", "cb-focal")
ONE_STEP = {f"step-{method}": {"method": method, "epochs": 1, "batch": 57} for method in METHODS} | {
    "step-views": {"classifier_images": "views", "sampler": "instance", "class_weights": 0.99, "schedule": "sum", "epochs": 1, "batch": 57},
}
for name in ("step-gpaco", "step-views"):  # of seed 0 a pixel stands at a ReLU's 0, where rounding decides whether it has a gradient
    ONE_STEP[name]["seed"] = 1
STOPPED = {"method": "hybrid-psc", "epochs": 3, "batch": 14, "validation": 0.2}
NORM_ROWS = (3, 1)


def tiny(out: Path, method: str = "hybrid-sc", **changes) -> Config:
    idle = ("hidden", "embedding", "backend") if settings.METHODS[method].method.feature_loss == "none" else ()
    return settings.configure("digits", method, **{name: TINY[name] for name in TINY if name not in idle} | changes, out=out)


def run_tiny(out: Path, **changes) -> None:
    config = tiny(out, **changes)
    train(config, datasets.load(config.images))


def go_on(out: Path) -> None:
    config = settings.change(settings.read(out), out=out)
    train(config, datasets.load(config.images), resume=True)


@contextlib.contextmanager
def at_step(number: int, rank: int, act):
    """``act()`` on one process at its ``number``-th update."""
    update, done = Run.update, []

    def counted(self, raw, labels):
        update(self, raw, labels)
        done.append(0)
        if len(done) == number and processes.rank() == rank:
            act()

    Run.update = counted
    try:
        yield
    finally:
        Run.update = update


def run_stopped(out: Path, rank: int) -> None:
    """A signal to one process after the third step stops all of them."""
    with at_step(3, rank, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        try:
            run_tiny(out, **STOPPED)
        except SystemExit as stopped:
            assert stopped.code == 128 + signal.SIGTERM
        else:
            raise AssertionError("the run was not stopped")


def normalise(layer: torch.nn.Module, rows: range) -> dict[str, torch.Tensor]:
    """Two rounds of a layer, value and gradient, of which a process has some rows."""
    random = torch.Generator().manual_seed(5)
    results = {}
    for step in range(2):
        x, grad = (torch.randn(sum(NORM_ROWS), 3, 2, 4, dtype=torch.float64, generator=random) * 2 + 50 for _ in range(2))
        x = x[rows.start : rows.stop].requires_grad_()
        y = layer(x)
        y.backward(grad[rows.start : rows.stop])
        results |= {f"y{step}": y.detach(), f"x{step}": x.grad}
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    return results | state | {"slope": layer.weight.grad, "offset": layer.bias.grad}


def norm_layer() -> torch.nn.BatchNorm2d:
    layer = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.1, 0.0, 0.3]))
    return layer


# ---- what torchrun starts


def script(folder: Path, _asked: None = None) -> None:
    with processes.together(torch.device("cpu")):
        hybrid.console.quiet = processes.rank() > 0
        for name, changes in (EPOCHS | ONE_STEP).items():
            run_tiny(folder / "two" / name, **changes)
        run_tiny(folder / "two" / "mixup", method="ce", mixup=0.4, class_weights=0.9, epochs=2, batch=27)
        try:
            run_tiny(folder / "two" / "kcl", method="kcl", switch_at=0.5, epochs=2, batch=27)
        except ValueError as error:
            (folder / f"kcl-{processes.rank()}").write_text(str(error))

        first = sum(NORM_ROWS[: processes.rank()])
        layer = processes.share_batch_statistics(norm_layer(), torch.device("cpu"))
        assert type(layer) is processes.SharedBatchNorm
        torch.save(normalise(layer, range(first, first + NORM_ROWS[processes.rank()])), folder / f"norm-{processes.rank()}.pt")

        run_tiny(folder / "two" / "whole", **STOPPED)
        run_stopped(folder / "two" / "cut", rank=1)
        if processes.rank() == 0:
            shutil.copytree(folder / "two" / "cut", folder / "two" / "cut-then-two")
        processes.wait_for_all()
        go_on(folder / "two" / "cut-then-two")
        go_on(folder / "one" / "cut-then-two")

        def unreadable() -> None:
            (folder / "error").write_text(str(time.time()))
            raise ValueError("image 7 is not a readable image")

        with at_step(6, 1, unreadable):
            run_tiny(folder / "two" / "restarted", **STOPPED)


def of_process(folder: Path) -> None:
    """What each process does, and does when it is started again."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if processes.restarts("RESTART_COUNT"):
        (folder / "restart").write_text(str(time.time()))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (TINY | STOPPED).items() if name != "pictures"]
        hybrid.main([*flags, "--no-pictures", "--out", str(folder / "two" / "restarted")])
    else:
        hybrid.parse, hybrid.command = (lambda *_: (folder, None)), script  # within main, for the words that an error ends with
        hybrid.main([])


def torchrun(folder: str) -> None:
    """As ``torchrun --standalone --nproc-per-node=2 --max-restarts=1``, by processes that need not import torch."""
    meet = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "of these tests"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method=warm().get_start_method(), **meet)
    elastic_launch(config, of_process)(Path(folder))


# ---- what pytest runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    run_stopped(folder / "one" / "cut-then-two", rank=0)
    started = Script(torchrun, str(folder))
    for name, changes in (EPOCHS | ONE_STEP).items():  # meanwhile, by one process
        run_tiny(folder / "one" / name, **changes)
    run_tiny(folder / "one" / "whole", **STOPPED)
    said = started.communicate(timeout=240)[0]
    assert started.returncode == 0, said + (folder / "output").read_text()
    return folder


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_course(one: Path, two: Path, tolerance: float) -> None:
    assert len(log(one)) == len(log(two)) > 0
    for mine, other in zip(log(one), log(two), strict=True):
        for name in ("alpha", "lr", "feature_loss", "chance", "classifier_loss", "train_accuracy", "images"):
            assert other[name] == (mine[name] and pytest.approx(mine[name], rel=tolerance)), name


@pytest.mark.parametrize("name", EPOCHS)
def test_losses_of_each_epoch(folder, name):
    assert_same_course(folder / "one" / name, folder / "two" / name, 1e-3 if name == "fp16" else 1e-5)
    metrics, other = (json.loads((folder / way / name / "metrics.json").read_text()) for way in ("one", "two"))
    assert (metrics["processes"], other["processes"]) == ([1], [2])
    assert json.loads((folder / "two" / name / "environment.json").read_text())["processes"] == 2
    assert other["best"]["calibration_error"] == pytest.approx(metrics["best"]["calibration_error"], rel=2e-2)
    assert (folder / "two" / name / "best.pt").exists() == (name == "stages")


@pytest.mark.parametrize("name", ONE_STEP)
def test_gradients_of_a_step(folder, name):
    """The optimiser's momentum after one step is the gradient and the decay of the weights."""
    one, two = (checkpoint.load(folder / way / name / "last.pt") for way in ("one", "two"))
    assert json.loads((folder / "two" / name / "metrics.json").read_text())["updates"] == 1
    mine, other = (state["optimizer"]["state"] for state in (one, two))
    assert mine.keys() == other.keys()
    scale = max(value["momentum_buffer"].abs().max() for value in mine.values())
    assert scale > 0.1
    rounding = 5e-6 if name in ("step-bcl", "step-gpaco") else 1e-6  # of sums that cancel more: both pull at every class
    for key, value in mine.items():
        torch.testing.assert_close(other[key]["momentum_buffer"], value["momentum_buffer"], rtol=1e-4, atol=rounding * float(scale))
    for part in one.keys() & {"network", "feature_loss", "momentum"}:
        for key, value in one[part].items():
            if not key.startswith("queue."):
                torch.testing.assert_close(two[part][key], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(one["random"]["cpu"], two["random"]["cpu"])


@pytest.mark.parametrize("name", ["step-paco", "step-gpaco"])
def test_the_queue_holds_the_rows_of_all(folder, name):
    """Each process's rows after the other's: one process has them in another order."""
    one, two = (checkpoint.load(folder / way / name / "last.pt")["feature_loss"] for way in ("one", "two"))
    assert one["queue.filled"] == two["queue.filled"] == 57

    def in_order(state):
        key, rows = state["queue.keys"][:57], state["queue.rows"][:57].double()
        order = (key * 1000 + rows[:, 0]).argsort()  # class by class
        return key[order], rows[order]

    for mine, other in zip(in_order(one), in_order(two), strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


def test_mixup(folder):
    """Partners are of one's own process, so one process alone has other ones: losses are of the size of chance, 2.3."""
    rows = log(folder / "two" / "mixup")
    assert len(rows) == 2 and all(1 < row["classifier_loss"] < 4 for row in rows)
    assert (folder / "two" / "mixup" / "metrics.json").exists()


def test_a_method_that_serves_one_process_says_so(folder):
    for rank in range(2):
        assert "feature_loss 'kcl' names positives by number and serves one process, got several" in (folder / f"kcl-{rank}").read_text()
    assert not (folder / "two" / "kcl").exists()


def test_batch_normalisation(folder):
    expected = normalise(norm_layer(), range(sum(NORM_ROWS)))
    parts = [torch.load(folder / f"norm-{rank}.pt") for rank in range(2)]
    for name, value in expected.items():
        if name[0] in "xy":
            got = torch.cat([part[name] for part in parts])
        elif name in ("slope", "offset"):  # each process has its rows' share
            got = parts[0][name] + parts[1][name]
        else:
            got = parts[0][name]
            assert torch.equal(got, parts[1][name])
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)


def test_stopped_by_a_signal_to_one_process(folder):
    """At the same step, with a checkpoint, which two processes go on from to the same bits, and any other number to the same course."""
    cut = folder / "two" / "cut"
    assert checkpoint.load(cut / "last.pt")["step"] == 3 and not (cut / "metrics.json").exists()
    whole, again = (checkpoint.load(folder / "two" / name / "last.pt") for name in ("whole", "cut-then-two"))
    for part in ("network", "feature_loss"):
        assert all(torch.equal(value, again[part][key]) for key, value in whole[part].items())
    go_on(cut)
    assert_same_course(folder / "one" / "whole", cut, 1e-4)
    assert json.loads((cut / "metrics.json").read_text())["processes"] == [1]  # no epoch was ended by two


def test_a_run_of_one_process_goes_on_with_two(folder):
    assert_same_course(folder / "one" / "whole", folder / "one" / "cut-then-two", 1e-4)
    assert json.loads((folder / "one" / "cut-then-two" / "metrics.json").read_text())["processes"] == [2]


def test_an_error_of_one_process_ends_all_and_a_restart_goes_on(folder):
    seconds = float((folder / "restart").read_text()) - float((folder / "error").read_text())
    assert seconds < 60  # of which a new process takes some to come to its script
    assert "error on rank 1: image 7 is not a readable image" in (folder / "output").read_text()
    whole, again = (checkpoint.load(folder / "two" / name / "last.pt") for name in ("whole", "restarted"))
    assert all(torch.equal(value, again["network"][key]) for key, value in whole["network"].items())
    assert (folder / "two" / "restarted" / "metrics.json").exists()


def test_one_process_speaks(folder):
    output = (folder / "output").read_text()
    assert output.count("stopped in epoch") == output.count("written to") == output.count("two/hybrid-sc: epoch 2 of 2") == 1


@pytest.fixture
def as_one_of(monkeypatch):
    def pretend(rank, count):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)

    return pretend


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_are_all_without_overlap(as_one_of, tmp_path, count, same):
    """Whether both branches augment alike, as one batch, or each by itself."""
    parts, columns, images, augmented = [], [], [], []
    augmentation = Augmentation(crop_padding=1, flip=True, rotate=15, shift=0.1, zoom=0.1, color_jitter=0.5, randaugment=2)
    config = tiny(tmp_path, batch=10, classifier_batch=7, epochs=1)
    config = dataclasses.replace(config, augment=augmentation, feature_augment=augmentation if same else Augmentation(rotate=40.0))
    data = datasets.load(config.images)
    for rank in range(count):
        as_one_of(rank, count)
        parts.append(list(processes.part(10)))
        run = Run(config, data)
        columns.append(run.plan.own)
        raw, labels = next(run.batches["train"](run.plan.indices, columns=run.plan.own))
        assert torch.equal(labels, data.train.labels[run.plan.indices[0, run.plan.own]])
        assert run.plan.parts == (2 * len(parts[-1]), 0, len(processes.part(7)))
        images.append(raw)
        torch.manual_seed(3)
        augmented.append(run.augmented(raw))
    assert list(itertools.chain(*parts)) == list(range(10)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    order = torch.cat(columns)
    assert order.sort().values.tolist() == list(range(27))
    torch.manual_seed(3)
    every = data.train.images[run.plan.indices[0]]
    if same:
        whole = augmentation.train(every, Draws(27, run.device))
    else:
        pieces = ((config.feature_augment, every[:20]), (augmentation, every[20:]))
        whole = torch.cat([how.train(some, Draws(len(some), run.device)) for how, some in pieces])
    assert torch.equal(torch.cat(images), data.train.images[run.plan.indices[0, order]])
    torch.testing.assert_close(torch.cat(augmented), whole[order], rtol=1e-5, atol=1e-5)


def test_files_keep_their_crops(as_one_of, tmp_path):
    from PIL import Image

    for i in range(4):
        Image.effect_noise((20, 24), 50).save(tmp_path / f"{i}.png")
    split = datasets.Split([tmp_path / f"{i}.png" for i in range(4)], torch.arange(4))
    batches, plan = datasets.Batches(split, torch.device("cpu"), 8, workers=0), torch.tensor([[0, 1, 1, 2, 3], [3, 2, 1, 0, 0]])
    whole = list(batches(plan, 1, key=(5,)))
    some = list(batches(plan, 1, (5,), torch.tensor([1, 4])))
    assert len(some) == len(whole) == 1
    assert torch.equal(some[0][0], whole[0][0][[1, 4]]) and some[0][1].tolist() == [2, 0]


def test_what_several_processes_cannot_do(as_one_of, monkeypatch, tmp_path):
    config = tiny(tmp_path, batch=2, classifier_batch=3)
    data = datasets.load(config.images)
    as_one_of(0, 3)
    with pytest.raises(ValueError, match="batch must be at least the number of processes, 3, got 2"):
        Run(config, data)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for layer in (torch.nn.BatchNorm2d(2, affine=False), torch.nn.BatchNorm2d(2, track_running_stats=False), torch.nn.SyncBatchNorm(2)):
        with pytest.raises(ValueError, match=r"network must normalise by nn\.BatchNorm"):
            processes.share_batch_statistics(layer, torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="out must be named where torchrun may restart"):
        hybrid.main([])
    with pytest.raises(ValueError, match="device must be 'cuda' or 'cpu' under torchrun"):
        processes.device("cuda:0")
    assert processes.device("cuda") == torch.device("cuda:1") and processes.device("cpu") == torch.device("cpu")
