"""The training script: every loss and option takes its steps, and a run that was stopped comes to the same bits."""

import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import checkpoint
import compare
import data as datasets
import evaluate
import hybrid
import plots
import run_folder
import settings
import several
import terminal
from hybrid import train
from methods import METHODS
from rich.console import Console
from run import Run
from settings import Config

from tests.processes import Script

ROOT = Path(__file__).parents[1]
# 58 images of digits, a network of a few thousand weights, two steps an epoch.
TINY = {
    "largest_class": 12, "imbalance": 4, "width": 4, "hidden": 16, "embedding": 8, "epochs": 2, "batch": 28, "pictures": False,
    "device": "cpu", "threads": 1, "eval_every": 1, "backend": "chunked",
}  # fmt: skip
STILL = {"rotate": 0.0, "shift": 0.0, "zoom": 0.0}


def tiny(out, data="digits", method="hybrid-sc", **changes) -> Config:
    return settings.configure(data, method, **acting(method, TINY, **changes), out=Path(out))


def acting(method, small, **changes):
    """Small settings with changes, without those small ones that would be refused as nothing reads them."""
    idle = {"hidden", "embedding", "backend"} if method in METHODS and METHODS[method].method.feature_loss == "none" else set()
    if changes.get("network", "resnet8") not in ("resnet8", "mlp"):
        idle |= {"width"}
    return {name: value for name, value in small.items() if name not in idle} | changes


def run_tiny(out, **changes):
    config = tiny(out, **changes)
    return train(config, datasets.load(config.images))


def run_of(out, **changes) -> Run:
    config = tiny(out, **changes)
    return Run(config, datasets.load(config.images))


def go_on(out, epochs=None) -> None:
    hybrid.main(["--resume", str(out), *(["--epochs", str(epochs)] if epochs else [])])


def weights(out) -> dict:
    return checkpoint.load(Path(out) / "last.pt")


def same(a, b) -> bool:
    """Two checkpoints bit for bit, times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        clock = {"seconds", "images_per_second"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - clock)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_moved(start: Run, out) -> None:
    """From its beginning to its checkpoint, backbone and classifier have learned."""
    end = weights(out)["network"]
    moved = [k for k, v in start.network.state_dict().items() if not torch.equal(v, end[k])]
    assert any(k.startswith("classifier") for k in moved) and any(k.startswith("backbone") for k in moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "hybrid-psc", "denominator": "all"},
        {"method": "hybrid-mpsc", "prototypes_per_class": 3},
        {"method": "ce", "sampler": "square-root", "logit_adjustment": 1.0},
        {"feature_sampler": "reverse", "sampler": "instance", "classifier_batch": 10},
        {"schedule": "two-stage"},
        {"schedule": "beta"},
        {"schedule": "switch", "switch_at": 0.25},
        {"precision": "bf16"},
        {"precision": "fp16", "clip": 1.0},
        {"ema": 0.9, "clip": 0.5, "milestones": (0.5,), "warmup": 0.1},
        {"randaugment": 1, "color_jitter": 0.5, "crop_padding": 1, "flip": True},
        {"channels_last": False, "backend": "reference", "validation": 0.2, "batch": 20},
        {"optimiser": "adamw", "lr": 1e-3},
        {"classifier_images": "shared", "sampler": "instance"},
        {"classifier_images": "views", "sampler": "instance", "class_weights": 0.99, "reweight_from": 0.5},
    ],
    ids=lambda changes: "-".join(f"{k}-{v}" for k, v in changes.items()),
)
def test_smoke(tmp_path, changes):
    result = run_tiny(tmp_path / "run", **changes)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1] and result["updates"] == 4
    for row in log:
        used = [row[name] for name in ("feature_loss", "classifier_loss") if row[name] is not None]
        assert used and all(map(math.isfinite, used))
    assert 0 <= result["best"]["balanced"] <= 100
    start = run_of(tmp_path / "x", **changes)
    assert_moved(start, tmp_path / "run")
    if changes.get("method") in ("hybrid-psc", "hybrid-mpsc"):
        assert not torch.equal(start.feature_loss.loss.prototypes, weights(tmp_path / "run")["feature_loss"]["loss.prototypes"])


def test_compiled_network_takes_a_step(tmp_path, monkeypatch):
    """Captured as for inductor, which would spend half a minute of C++ compilation on it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run_tiny(tmp_path / "run", compile=True, epochs=1)


def test_two_views_share_images_and_the_classifier_has_its_own(tmp_path):
    plan = run_of(tmp_path).plan
    views, rest = plan.indices[:, :56], plan.indices[:, 56:]
    assert torch.equal(views[:, :28], views[:, 28:]) and rest.shape == (2, 28)
    assert views[:, :28].unique().numel() == 56  # a pass without repetition
    assert plan.parts == (56, 0, 28)


def test_the_classifier_may_have_the_feature_branchs_images_or_its_very_views(tmp_path):
    shared, views = (run_of(tmp_path, classifier_images=whose, sampler="instance") for whose in ("shared", "views"))
    assert shared.plan.parts == (56, 0, 28) and torch.equal(shared.plan.indices[:, 56:], shared.plan.indices[:, :28])
    assert views.plan.parts == (56, 0, 0) and views.plan.indices.shape == (2, 56)
    # The mean over both views, of the formula.
    run = run_of(tmp_path, classifier_images="views", sampler="instance", **STILL)
    raw, labels = next(iter(run.batches["train"](run.plan.indices)))
    logits = run.network(run.config.augment.evaluate(raw), 56, 0)[1].detach().double()
    run.update(raw, labels)
    means = run.means()
    assert means["classifier_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert means["train_accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_the_first_steps_losses_are_the_formulas(tmp_path):
    """alpha = 1 in the first epoch; feature and classifier loss as in the paper, from the textbook expressions."""
    run = run_of(tmp_path, **STILL, sampler="square-root", logit_adjustment=1.0)
    raw, labels = next(iter(run.batches["train"](run.plan.indices)))
    with torch.no_grad():
        z, logits, features = run.network(run.config.augment.evaluate(raw), 56, 56)
    assert features.shape == (84, 16)
    z, y = torch.nn.functional.normalize(z.double()), labels[:56]
    s = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    positive = (y[:, None] == y) & ~torch.eye(56, dtype=torch.bool)
    expected = (s.logsumexp(1) - s.where(positive, 0).sum(1) / positive.sum(1)).mean()
    adjusted = logits.double() + run.data.counts.log() / 2  # the sampler's prior, but for a constant
    classifier = torch.nn.functional.cross_entropy(adjusted, labels[56:])
    run = Run(run.config, run.data)
    run.update(raw, labels)
    means = run.means()
    assert means["feature_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert means["classifier_loss"] == pytest.approx(classifier.item(), rel=1e-4)
    assert means["chance"] == pytest.approx(math.log(55))


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_tiny(tmp_path / name, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a")["network"], weights(tmp_path / "c")["network"])


class StopAfter:
    """A stop signal that comes with a given step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, raw, labels, update):
        update(raw, labels)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "changes",
    [
        *({"ema": 0.9}, {"method": "hybrid-psc", "precision": "fp16"}, {"schedule": "two-stage"}, {"method": "bcl"}),
        *({"method": "paco", "queue": 20}, {"method": "gpaco"}, {"method": "kcl", "switch_at": 0.6}),
        *({"method": "crt", "switch_at": 0.5, "ema": 0.9}, {"method": "ldam-drw", "reweight_from": 0.5}, {"method": "tau-norm"}),
        *({"method": "ours", "most_shown": 3}, {"method": "crt", "switch_at": 0.5, "sampler": "square-root", "logit_adjustment": 1.0}),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("step", [2, 3])
def test_stopped_and_resumed_comes_to_the_same_bits(tmp_path, monkeypatch, changes, step):
    changes |= {"epochs": 3, "validation": 0.2, "batch": 14}
    run_tiny(tmp_path / "whole", **changes)
    stop, update = StopAfter(step), Run.update
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Run, "update", lambda self, raw, labels: stop(raw, labels, lambda *batch: update(self, *batch)))
        run_tiny(tmp_path / "cut", **changes)
    assert stopped.value.code == 128 + signal.SIGTERM
    state, run = weights(tmp_path / "cut"), run_of(tmp_path / "x", **changes)
    assert state["epoch"] * run.steps + state["step"] == step
    if changes.get("method") == "paco":
        assert state["feature_loss"]["queue.filled"] == 20 and state["momentum"]["n_averaged"] == step
        assert not torch.equal(state["momentum"]["module.head.0.weight"], state["network"]["head.0.weight"])
    torch.rand(7)  # the state of the generators must come from the checkpoint
    go_on(tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    whole, cut = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut"))
    assert cut["best"] == whole["best"] and cut["last"] == whole["last"] and cut["best_epoch"] == whole["best_epoch"]


def command(*arguments) -> list[str]:
    given = TINY | {"batch": 14, "eval_every": 60}
    flags = [word for name, value in given.items() if name != "pictures" for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["--no-pictures", *flags, *arguments]


def start(arguments, own_group=False) -> Script:
    return Script(ROOT / "train" / "hybrid.py", *arguments, folder=ROOT, own_group=own_group)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def test_killed_and_resumed_comes_to_the_same_bits(tmp_path):
    """SIGKILL at whatever moment: at most the epoch at hand or a second is lost, and trained again to the same bits."""
    out = tmp_path / "killed"
    process = start(command("--epochs", "200", "--out", str(out)))
    wait_for(lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= 3, process)
    time.sleep(0.5)  # epochs that are not written yet
    process.kill()
    assert not (out / "metrics.json").exists()
    assert weights(out)["epoch"] >= len((out / "log.jsonl").read_text().splitlines())
    resumed = start(["--resume", str(out)])
    text = resumed.communicate()[0]
    assert resumed.returncode == 0, text
    config = settings.change(settings.read(out), out=tmp_path / "whole")
    train(config, datasets.load(config.images))
    assert same(weights(out), weights(tmp_path / "whole"))


def test_which_epochs_are_written(tmp_path):
    """The last, those that are kept, that which best.pt is of, and the first that ends a second after the one written before."""
    run = run_of(tmp_path, epochs=9, keep_every=4)

    def due(epoch, best=8, seconds=0.0):
        run.epoch, run.best = epoch, {"epoch": best, "balanced": 50.0}
        return run_folder.is_due(run, seconds)

    assert [epoch for epoch in range(1, 10) if due(epoch)] == [4, 8, 9]
    assert due(3, best=2) and due(3, seconds=1.0) and not due(3, best=1, seconds=0.9)


def test_resume_takes_the_runs_own_settings(tmp_path):
    run_tiny(tmp_path / "run")
    for folder, message in (("run", "take the run's own settings, got also: lr"), ("nothing", "nothing does not exist")):
        with pytest.raises(SystemExit, match=message):
            hybrid.main(["--resume", str(tmp_path / folder), "--lr", "9"])
    with pytest.raises(SystemExit, match="take the run's own settings, got also: epochs"):
        hybrid.main(["--eval-only", str(tmp_path / "run"), "--epochs", "9"])
    with pytest.raises(SystemExit, match=r"take the folder of a run, got the file .*config\.json"):
        hybrid.main(["--resume", str(tmp_path / "run" / "config.json")])
    with pytest.raises(SystemExit, match="epochs may extend a run of 2, got 1"):
        go_on(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="holds a run already"):
        run_tiny(tmp_path / "run")
    assert settings.read(tmp_path / "run") == tiny(tmp_path / "run")


@pytest.mark.parametrize("several", [False, True])
def test_resume_extends(tmp_path, several):
    """The finished epochs stay as they were; the folder then tells of the new number."""
    out = tmp_path / "run"
    tops = [out, *([out / "ce" / "seed-0", out / "hybrid-sc" / "seed-0"] if several else [])]
    config = tiny(out, **({"against": ("ce",), "epochs": 1} if several else {}))
    hybrid.perform(config, hybrid.Command())
    before = [json.loads(line) for line in (tops[-1] / "log.jsonl").read_text().splitlines()]
    epochs = len(before) + 2
    go_on(out, epochs)
    assert [settings.read(top).optimiser.epochs for top in tops] == ([3, 9, 3] if several else [4])
    after = [json.loads(line) for line in (tops[-1] / "log.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before and [row["epoch"] for row in after] == list(range(epochs))
    metrics = json.loads((tops[-1] / "metrics.json").read_text())
    assert metrics["updates"] == 2 * epochs and metrics["best_epoch"] == epochs - 1 and metrics["config"]["optimiser"]["epochs"] == epochs
    assert metrics["of_epochs"] == [len(before), epochs] and "The run was extended" in (tops[-1] / "README.md").read_text(encoding="utf-8")


def test_stopped_in_an_evaluation(tmp_path, monkeypatch):
    """All steps of the epoch are kept, and resuming evaluates it."""
    run_tiny(tmp_path / "whole")
    predict = evaluate.predict
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(evaluate, "predict", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or predict(*given))
        run_tiny(tmp_path / "cut", eval_every=2)
    assert stopped.value.code == 128 + signal.SIGTERM and not (tmp_path / "cut" / "metrics.json").exists()
    assert (weights(tmp_path / "cut")["epoch"], weights(tmp_path / "cut")["step"]) == (1, 2)  # not waited for to the evaluation's end
    go_on(tmp_path / "cut")
    assert same(weights(tmp_path / "cut")["network"], weights(tmp_path / "whole")["network"])
    assert (tmp_path / "cut" / "metrics.json").exists()


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_stopped_command_says_how_to_go_on(tmp_path, monkeypatch, capsys, seeds):
    """With all runs of the folder, whose name a shell would split."""
    out = tmp_path / "my run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop, update = StopAfter(3), Run.update
        patch.setattr(Run, "update", lambda self, raw, labels: stop(raw, labels, lambda *batch: update(self, *batch)))
        hybrid.main([*command("--out", str(out), *(["--seeds", str(seeds)] if seeds > 1 else [])), "--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"go on with: python train/hybrid.py --resume '{out}'"
    assert lines[-2] == f"{out / 'seed-0' if seeds > 1 else out}: stopped in epoch 0"
    hybrid.main(["--resume", str(out)])
    assert len(list(out.rglob("metrics.json"))) == seeds


def test_a_stopped_run_evaluated_is_not_taken_for_finished(tmp_path, monkeypatch):
    stop, update, out = StopAfter(3), Run.update, tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "update", lambda self, raw, labels: stop(raw, labels, lambda *batch: update(self, *batch)))
        run_tiny(out)
    hybrid.main(["--eval-only", str(out)])
    assert json.loads((out / "metrics.json").read_text())["updates"] == 2
    assert weights(out)["step"] == 1  # evaluated, not trained on
    go_on(out)
    assert json.loads((out / "metrics.json").read_text())["updates"] == 4
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log.splitlines()[0] + "\n")  # as if killed between the last checkpoint and its row
    go_on(out)
    assert len((out / "log.jsonl").read_text().splitlines()) == 2


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    config = tiny(tmp_path / "run", epochs=1)
    data = datasets.load(config.images)
    result = hybrid.finish(config, data)
    written = (tmp_path / "run" / "last.pt").stat().st_mtime_ns
    assert hybrid.finish(settings.change(config, threads=2, pictures=True), data)["best"] == result["best"]
    assert (tmp_path / "run" / "last.pt").stat().st_mtime_ns == written  # read, not trained again
    with pytest.raises(ValueError, match=r"holds a run of other settings \(epochs, lr\)"):
        hybrid.finish(settings.change(config, epochs=3, lr=0.2), data)


def test_a_run_is_alone_in_its_folder(tmp_path):
    run_tiny(tmp_path)
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('another'); f.flush(); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holds, tmp_path / ".lock"], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(SystemExit, match=r"is being written by another run, .*another: name another folder"):
            hybrid.main(["--eval-only", str(tmp_path)])
        other.kill()
    hybrid.main(["--eval-only", str(tmp_path)])  # the file is left, and nobody holds it


def test_where_a_run_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(SystemExit, match=r"out .*file.* must be a folder, and .*file is a file"):
            hybrid.main(["--out", str(tmp_path / out)])


def test_what_is_left_of_a_run(tmp_path):
    """Its checkpoint is another network's, or lost."""
    run_tiny(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(SystemExit, match=r"metrics\.json is not readable JSON"):
        go_on(tmp_path)
    (tmp_path / "metrics.json").unlink()
    checkpoint.save(tmp_path / "last.pt", weights(tmp_path) | {"network": {}})
    with pytest.raises(SystemExit, match=r"last\.pt is not a checkpoint of this run: RuntimeError: .*Missing key"):
        go_on(tmp_path)
    (tmp_path / "last.pt").unlink()
    with pytest.raises(SystemExit, match=r"last\.pt does not exist, and .*log\.jsonl tells of epochs that were trained"):
        go_on(tmp_path)


def test_figures_come_before_pictures_which_may_fail(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        assert (tmp_path / "metrics.json").exists() and not (tmp_path / "README.md").exists()
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(plots, "curves", broken)
    run_tiny(tmp_path, pictures=True)
    assert capsys.readouterr().err == f"{tmp_path}/curves.png could not be drawn: RuntimeError: no font\n"
    assert (tmp_path / "per_class.png").exists() and (tmp_path / "README.md").exists()


def test_too_little_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Run, "update", full)
    with pytest.raises(MemoryError, match=r"lower --batch, .*--eval-batch.* \(CUDA out of memory\. Tried to allocate 2 GiB\)"):
        run_tiny(tmp_path)


def test_a_worker_that_dies_during_a_step(tmp_path, monkeypatch):
    def told(*_):  # as by torch's handler of SIGCHLD
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(Run, "update", told)
    with pytest.raises(OSError, match=r"a process that decodes images ended \(.*Killed.*fewer workers need less"):
        run_tiny(tmp_path)


def test_an_evaluation_takes_as_many_images_as_a_step(tmp_path, monkeypatch):
    sizes, predict = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *given: sizes.append(given[4]) or predict(*given))
    for batch, given, expected in ((7, None, 21), (28, None, 84), (28, 5, 5)):  # two views and the classifier's own
        run_of(tmp_path / "run", batch=batch, eval_batch=given).predict("test", "logits")
        assert sizes.pop() == expected


def test_a_log_has_a_line_of_each_evaluation(tmp_path, capsys):
    run_tiny(tmp_path / "x" / "run", eval_every=2, epochs=4)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if re.match(r".*x/run: epoch [24] of 4, test \d+\.\d %  \d+ images/s", line)]
    assert len(told) == 2 and len(lines) < 6 and not any("\x1b" in line for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_said_once(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        for _ in range(2):
            terminal.say("lost")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and "the run goes on" in said


def test_what_would_command_a_terminal_is_escaped():
    assert terminal.printable("a\nb [red] 中 \x1b[31m\u202e\udcff") == r"a b [red] 中 \x1b[31m\u202e\udcff"


def test_which_signals_stop(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with checkpoint.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
            assert signal.getsignal(signal.SIGTTOU) == signal.SIG_IGN  # or writing from the background could halt it
    finally:
        signal.signal(signal.SIGHUP, before)
    with pytest.raises(SystemExit) as left, checkpoint.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # with the first
        assert stop.received == signal.SIGUSR1
    assert left.value.code == 128 + signal.SIGUSR1  # nobody looked
    monkeypatch.setattr(checkpoint.StopSignal, "TOGETHER", -1.0)
    with pytest.raises(SystemExit) as left, checkpoint.StopSignal():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 128 + signal.SIGTERM


def test_a_write_that_fails_names_its_file(tmp_path):
    def torch_saves(_):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")

    with pytest.raises(OSError, match=r"last\.pt could not be written, and is as it was before: .*No space left on device"):
        checkpoint.write_whole(tmp_path / "last.pt", torch_saves)
    assert list(tmp_path.iterdir()) == []


def test_progress_fits_80_columns(monkeypatch):
    screen = Console(width=80, file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(terminal, "console", screen)
    row = {"images_per_second": 12345.6, "alpha": 0.5, "feature_loss": 1.5, "chance": 4.844, "classifier_loss": 2.5}
    with terminal.progress_bar() as progress:
        task = progress.add_task("runs/cifar10-jpeg-mpsc-20260101-120000", total=4800, completed=17, text="")
        progress.update(task, text=terminal.status(row))
        lines = ["".join(part.text for part in line).rstrip() for line in screen.render_lines(progress.get_renderable())]
    assert lines[0].startswith("runs/cifar10-jpeg-mpsc-20260101-120000 ") and re.search(r"17/4800 0:00:00 -:--:--$", lines[0])
    assert lines[1] == "12346 images/s  α 0.50  feature 1.500  (chance 4.844)  classifier 2.500"


def test_tensorboard_has_every_epoch(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs train/requirements-extra.txt")
    run_tiny(tmp_path / "run", log_to=("tensorboard",))
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in events.Scalars("feature_loss")] == [(r["epoch"], pytest.approx(r["feature_loss"])) for r in log]


def test_a_cpu_runs_generators_are_no_obstacle_to_a_gpu():
    state = checkpoint.random_state(torch.device("cpu"))
    expected = torch.rand(3)
    checkpoint.set_random_state(state, torch.device("cuda"))
    assert torch.equal(torch.rand(3), expected)


def test_what_is_not_finite_ends_the_run(tmp_path):
    """A step's loss is that of the weights before it: after the last one the evaluation tells."""
    with pytest.raises(
        FloatingPointError, match=r"the loss is not finite in epoch 0 of .*run \(.*_loss nan; there is no epoch before\): try a lower"
    ):
        run_tiny(tmp_path / "run", lr=1e30, warmup=0.0)
    with pytest.raises(FloatingPointError, match="logits of images 0 to 173 are not finite: try a lower --lr"):
        run_tiny(tmp_path / "one step", lr=1e30, warmup=0.0, batch=58)
    assert not list(tmp_path.rglob("last.pt"))


def test_command_line_from_seeds_to_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors", reason="needs train/requirements-extra.txt")
    out = tmp_path / "two"
    flags = ["--pictures", "--method", "hybrid-psc", "--epochs", "1", "--seeds", "2", "--seed", "5", "--export", "safetensors"]
    hybrid.main(command(*flags, "--out", str(out)))
    assert "mean" in capsys.readouterr().out
    run = out / "seed-6"
    for name in ("config.json", "environment.json", "metrics.json", "log.jsonl", "last.pt", "per_class.csv", "model.safetensors"):
        assert (run / name).stat().st_size > 0
    for name in ("per_class.png", "confusion.png", "embedding.png", "curves.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    from safetensors.torch import load_file

    exported = load_file(run / "model.safetensors")
    assert same(exported, weights(run)["network"])
    before = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    hybrid.main(["--eval-only", str(run)])
    assert json.loads((run / "metrics.json").read_text())["best"] == before["best"]
    compare.main(compare.Compare([out, run], tmp_path / "compared", ["two", "one"]))
    assert "| two | 4 | " in (tmp_path / "compared" / "comparison.md").read_text()
    assert (tmp_path / "compared" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"error: .*holds a run already"):
        hybrid.main(["--out", str(out)])


def test_what_cannot_be_compared(tmp_path):
    for name, data in (("a", "digits"), ("b", "mnist")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"config": {"images": {"data": data}}}))
    (tmp_path / "c").mkdir()
    wrong = ([], "at least one"), (["a", "b"], "one data set, got digits, mnist"), (["c"], "is the run finished"), (["d"], "no such folder")
    for runs, message in wrong:
        with pytest.raises(SystemExit, match=message):
            compare.main(compare.Compare([tmp_path / name for name in runs], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_paired_differences_go_by_seed():
    def runs(values):
        return [{"config": {"records": {"seed": s}}, "best": {"balanced": v}} for s, v in values.items()]

    assert compare.paired(runs({1: 90.0, 2: 94.0}), runs({2: 92.0, 1: 91.0})) == [-1.0, 2.0]
    assert compare.paired(runs({1: 90.0}), runs({2: 92.0})) == []
    assert compare.spread([1.0, 3.0]) == "2.0 ± 1.4" and compare.spread([1.0, None]) == "–"


@pytest.mark.parametrize("method", METHODS)
def test_beside_another_method_as_many_images_go_through_the_network(tmp_path, method):
    """The recipe's own numbers of epochs and those of --against; the data set's temperature for prototypes in both."""

    def images(config):
        run = Run(config, data)
        total = 0
        for run.epoch in range(config.optimiser.epochs):
            run.begin_epoch()
            total += run.plan.indices.numel()
        return total

    machine = {name: TINY[name] for name in ("device", "threads", "width")}
    config = settings.configure(method="hybrid-sc", **machine)
    data = datasets.load(config.images)
    expected = images(config)
    beside, alone = several.beside(config, method), settings.configure(method=method, **machine)
    assert images(beside) == pytest.approx(expected, rel=0.02) and images(alone) == pytest.approx(expected, rel=0.02)
    assert settings.change(beside, epochs=1000) == settings.change(alone, epochs=1000)


def test_what_cannot_be_trained_beside_is_told_before_anything_is_trained(tmp_path):
    for against, message in (
        (("ce", "nonsense"), "against must be one of ce, .*nonsense"),
        (("ce", "ce"), "against must name other methods than hybrid-sc, each once, got ce, ce"),
        (("hybrid-sc",), "each once, got hybrid-sc"),
        (("ce", "kcl"), "against kcl: switch_at must leave the second of two stages an epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            hybrid.perform(tiny(tmp_path / "run", against=against, epochs=1), hybrid.Command())
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_hybrid_beats_guessing_by_far(tmp_path):
    """The whole recipe in a quarter of its epochs, three seeds: a loose bound on the mean."""
    accuracies = []
    for seed in range(3):
        machine = {name: TINY[name] for name in ("pictures", "device", "threads", "backend")}
        config = settings.configure(method="hybrid-psc", epochs=20, seed=seed, out=tmp_path / str(seed), **machine)
        accuracies.append(train(config, datasets.load(config.images))["best"]["balanced"])
    assert sum(accuracies) / 3 > 60  # chance 10


def make_image_folder(root):
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for c in range(2):
        (root / f"class {c}").mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 128, (24, 32, 3), dtype=np.uint8) + np.uint8(127 * c)
            Image.fromarray(pixels).save(root / f"class {c}" / f"{i}.png")


def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(tmp_path):
    """As Ctrl-C in a terminal sends it: the workers go on decoding for the step at hand."""
    make_image_folder(tmp_path / "images")
    out, folder = tmp_path / "run", ["--data", "folder", "--root", str(tmp_path / "images"), "--network", "resnet8"]
    process = start(command(*folder, "--image-size", "16", "--workers", "2", "--epochs", "1000", "--out", str(out)), own_group=True)
    wait_for(lambda: (out / "log.jsonl").exists(), process)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "stopped in epoch" in text and weights(out)["epoch"] >= 1


def test_image_files_train_and_resume(tmp_path, monkeypatch):
    """Decoded in a worker, cropped by key: a run stopped inside an epoch comes to the same bits here too."""
    make_image_folder(tmp_path / "images")
    changes = {"data": "folder", "root": tmp_path / "images", "largest_class": None, "imbalance": 2, "network": "resnet8", "batch": 8}
    changes |= {"image_size": 16, "workers": 1, "lr": 0.05, "color_jitter": 0.2}
    whole = run_tiny(tmp_path / "whole", **changes)
    assert whole["train_images"] == [16, 8] and whole["updates"] == 6
    stop, update = StopAfter(2), Run.update
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "update", lambda self, raw, labels: stop(raw, labels, lambda *batch: update(self, *batch)))
        run_tiny(tmp_path / "cut", **changes)
    go_on(tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
