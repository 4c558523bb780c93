"""Training by torchrun: two processes against one, at equal batches. One start of torchrun, and a restart, serve all tests;
this file is its script."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="needs the [train] extra")
pytest.importorskip("rich", reason="needs the [train] extra")
pytest.importorskip("sklearn", reason="needs the [train] extra")
pytest.importorskip("matplotlib", reason="needs the [train] extra")

import checkpoint
import data as datasets
import hybrid
import processes
from augment import Augmentation, Draws
from hybrid import Config, Run, read_config, resolve, source_of, train

ROOT = Path(__file__).parents[1]
TINY = {
    "largest_class": 12, "imbalance": 4, "width": 4, "hidden": 16, "embedding": 8, "pictures": False,
    "device": "cpu", "threads": 1, "eval_every": 1, "backend": "chunked",
}  # fmt: skip
# Odd batches, of which the processes have uneven parts.
EPOCHS = {loss: {"loss": loss, "epochs": 2, "batch": 27} for loss in ("sc", "psc", "ce")} | {
    "stages": {"schedule": "two-stage", "epochs": 3, "batch": 21, "classifier_batch": 11, "validation": 0.2, "ema": 0.9, "clip": 0.5},
    "fp16": {"precision": "fp16", "epochs": 1, "batch": 29, "loss": "mpsc", "logit_adjustment": 1.0},
}
ONE_STEP = {f"step-{loss}": {"loss": loss, "epochs": 1, "batch": 57} for loss in ("sc", "psc", "ce")}
STOPPED = {"loss": "psc", "epochs": 3, "batch": 14, "validation": 0.2}
NORM_ROWS = (3, 1)


def tiny(out: Path, **settings) -> Config:
    return resolve(Config(**TINY | settings, out=out))


def run_tiny(out: Path, **settings) -> None:
    config = tiny(out, **settings)
    train(config, datasets.load(source_of(config)))


def go_on(out: Path) -> None:
    config = read_config(out, Config())
    train(config, datasets.load(source_of(config)), resume=True)


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


def script(folder: Path) -> None:
    with processes.together(torch.device("cpu")):
        hybrid.console.quiet = processes.rank() > 0
        for name, settings in (EPOCHS | ONE_STEP).items():
            run_tiny(folder / "two" / name, **settings)

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


# ---- what pytest runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    run_stopped(folder / "one" / "cut-then-two", rank=0)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    paths = [str(ROOT / "train"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen([*line, "-m", "tests.test_train_distributed", str(folder)], cwd=ROOT, env=environment, **streams)
    for name, settings in (EPOCHS | ONE_STEP).items():  # meanwhile, by one process
        run_tiny(folder / "one" / name, **settings)
    run_tiny(folder / "one" / "whole", **STOPPED)
    output = started.communicate(timeout=120)[0]
    (folder / "output").write_text(output)
    assert started.returncode == 0, output
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
    for key, value in mine.items():
        torch.testing.assert_close(other[key]["momentum_buffer"], value["momentum_buffer"], rtol=1e-4, atol=1e-6 * float(scale))
    for part in ("network", "feature_loss"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(one["random"]["cpu"], two["random"]["cpu"])


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
    assert output.count("stopped in epoch") == output.count("written to") == output.count("two/sc ") == 1


@pytest.fixture
def as_one_of(monkeypatch):
    def pretend(rank, count):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda: count)

    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_are_all_without_overlap(as_one_of, tmp_path, count):
    parts, columns, images, augmented = [], [], [], []
    augmentation = Augmentation(crop_padding=1, flip=True, rotate=15, shift=0.1, zoom=0.1, color_jitter=0.5, randaugment=2)
    config = tiny(tmp_path, loss="sc", batch=10, classifier_batch=7, epochs=1)
    data = datasets.load(source_of(config))
    for rank in range(count):
        as_one_of(rank, count)
        parts.append(list(processes.part(10)))
        run = Run(config, data)
        columns.append(run.columns)
        raw, labels = next(run.batches["train"](run.plan, columns=run.columns))
        assert torch.equal(labels, data.train.labels[run.plan[0, run.columns]])
        images.append(raw)
        torch.manual_seed(3)
        augmented.append(augmentation.train(raw, run.draws))
    assert list(itertools.chain(*parts)) == list(range(10)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    order = torch.cat(columns)
    assert order.sort().values.tolist() == list(range(27))
    torch.manual_seed(3)
    whole = augmentation.train(data.train.images[run.plan[0]], Draws(27, run.device))
    assert torch.equal(torch.cat(images), data.train.images[run.plan[0, order]])
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
    config = tiny(tmp_path, loss="sc", batch=2, classifier_batch=3)
    data = datasets.load(source_of(config))
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
        hybrid.main(Config())
    with pytest.raises(ValueError, match="device must be 'cuda' or 'cpu' under torchrun"):
        processes.device("cuda:0")
    assert processes.device("cuda") == torch.device("cuda:1") and processes.device("cpu") == torch.device("cpu")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if processes.restarts("RESTART_COUNT"):
        (where / "restart").write_text(str(time.time()))
        hybrid.main(Config(**TINY | STOPPED, out=where / "two" / "restarted"))
    else:
        hybrid.command = script  # within main, for the words that an error ends with
        hybrid.main(where)
