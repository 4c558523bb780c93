"""The benchmark suite runs, records what its reports need, and its reports are made from what it recorded. Nothing here times."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import conftest
import naive
import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "rich", "tyro"):
    pytest.importorskip(package, reason=f"{package} (of the [bench] extra) is not installed")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import measure, report  # noqa: E402
from bench.__main__ import run  # noqa: E402
from bench.contenders import CONTENDERS, TEMPERATURE, Case  # noqa: E402

TINY = [Case("scl", 64, 128), Case("psc", 40, 128, 12)]


def test_a_run_is_recorded_and_reported(tmp_path):
    out = tmp_path / "results.json"
    run(TINY, ("naive", "chunked", "inf-cl"), out, rounds=2)
    entries = json.loads(out.read_text())["cases"]
    assert [(entry["case"]["loss"], entry["case"]["rows"]) for entry in entries] == [("psc", 40), ("scl", 64)]
    for entry in entries:
        assert entry["product"]["flops"] / entry["product"]["seconds"]["median"] > 1e6
        assert entry["date"] and entry["commit"] and entry["versions"]["torch"]
        assert "absent" in entry["contenders"]["inf-cl"]
        for name in ("naive", "chunked"):
            found = entry["contenders"][name]
            assert found["value_error"] < 1e-6 and found["gradient_error"] < 2e-6
            assert sys.platform != "linux" or found["extra_bytes"] >= 0
            for mode in ("forward", "forward+backward"):
                spread = found["seconds"][mode]
                assert spread["samples"] >= 2
                assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["max"]
    assert entries[1]["floor_flops"] == {"forward": 64 * 64 * 128, "forward+backward": 4 * 64 * 64 * 128}

    run(TINY[:1], ("chunked",), out, rounds=1)  # a second piece replaces its case and keeps the other
    merged = {entry["case"]["loss"]: list(entry["contenders"]) for entry in json.loads(out.read_text())["cases"]}
    assert merged["scl"] == ["chunked"] and "naive" in merged["psc"]

    written = report.write(out)
    assert {path.name for path in written} == {"results.json", "results.md", "results-time.png", "results-memory.png"}
    assert "SCL 64 × 128, float32, 1 thread" in written[1].read_text()


def test_a_contender_that_fails_is_a_result(tmp_path):
    out = tmp_path / "results.json"
    run([Case("scl", 32, 8, dtype="float16")], ("naive", "cut-cross-entropy"), out, rounds=1)
    (entry,) = json.loads(out.read_text())["cases"]
    assert "cut-cross-entropy" in report.tables(json.loads(out.read_text()))
    assert "absent" in entry["contenders"]["cut-cross-entropy"]


def test_a_file_of_another_machine_is_not_added_to(tmp_path):
    out = tmp_path / "results.json"
    before = json.dumps({"machine": {"processor": "abacus", "cores": 1, "device": "cpu"}, "cases": []})
    out.write_text(before)
    with pytest.raises(SystemExit, match="abacus"):
        run(TINY, ("chunked",), out, rounds=1)
    assert out.read_text() == before


@pytest.mark.parametrize("name", ["naive, warm heap", "torch.compile", "pytorch-metric-learning", "chunked", "cut-cross-entropy"])
def test_a_contender_computes_the_loss(name, monkeypatch):
    """On the same inputs, in this process; a kernel that wants a GPU is stood in for by its definition in plain PyTorch."""
    case = TINY[0]
    peer = types.ModuleType("cut_cross_entropy")
    peer.linear_cross_entropy = lambda e, c, targets, reduction, filter_eps: F.cross_entropy(e @ c.T, targets, reduction=reduction)
    if name == "cut-cross-entropy":
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", peer)
    elif reason := CONTENDERS[name].absent(case):
        pytest.skip(reason)
    monkeypatch.setattr(measure, "extra_bytes", lambda step, device: step() and 0)
    if name == "torch.compile":  # the compiler itself is the suite's affair
        monkeypatch.setattr("torch.compile", lambda loss, **options: loss)
    _, answer = measure.prepare(case, name, measure.float64_reference(case))
    cancellation = 10 if name == "cut-cross-entropy" else 1  # takes the self pair, e^10 of a sum of e^10.2 here, away afterwards
    assert answer["value_error"] < 1e-6 and answer["gradient_error"] < cancellation * 2e-6


def test_flex_attention_computes_the_loss():
    """Its value: without a GPU it has no backward."""
    features, labels = (tensor.detach() for tensor in TINY[0].inputs())
    exact = measure.float64_reference(TINY[0])[0]
    assert abs(CONTENDERS["FlexAttention"].build(TINY[0])(features, labels) - exact) < 1e-5


@pytest.mark.parametrize("name", ["naive", "chunked"])
def test_the_sampled_reference_is_that_of_its_anchors(name, monkeypatch):
    monkeypatch.setattr(measure, "NAIVE_ROWS", 0)
    monkeypatch.setattr(measure, "CHUNKED_ROWS", {"cpu": 0})
    case = Case("scl", 1024, 16)
    errors = measure.errors(case, CONTENDERS[name].build(case), measure.float64_reference(case))
    assert errors["value_error"] < 1e-6 and errors["gradient_error"] < 2e-6


def test_the_reports_command(tmp_path):
    out = tmp_path / "results.json"
    run(TINY[:1], ("chunked",), out, rounds=1)
    written = subprocess.run([sys.executable, "-m", "bench.report", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    assert len(written.stdout.split()) == 4 and (tmp_path / "results-time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [1, 5, 41, 100])
def test_pscs_reference_by_blocks_is_the_direct_one(rows, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK", 12 * rows + 7)
    case = Case("psc", 41, 16, 12)
    features, labels, prototypes = (x.detach().double().requires_grad_() if x.is_floating_point() else x for x in case.inputs())
    loss = naive.psc_loss(features, labels, prototypes, temperature=TEMPERATURE)
    direct = loss.detach(), *torch.autograd.grad(loss, (features, prototypes))
    for blocks, exact in zip(measure.float64_reference(case), direct, strict=True):
        assert (blocks - exact).norm() <= 1e-14 * exact.norm()


FAULTS = {  # (loss, worker, what it is asked): one case loses everything, the other its reference, its floor and one contender
    ("scl", "reference", "prepare"): "dies",
    ("scl", "chunked", "prepare"): "refuses",
    ("scl", "product", "prepare"): "hangs",
    ("psc", "reference", "prepare"): "refuses",
    ("psc", "chunked", "forward"): "hangs",
    ("psc", "product", "product"): "dies",
}


class Faulty(measure.Worker):
    """A worker that does at a request what FAULTS says."""

    def __init__(self, case, name, reference):
        super().__init__(case, name, reference)
        self.place = case.loss, name

    def ask(self, request):
        fault = FAULTS.get((*self.place, request))
        if fault == "hangs":
            os.kill(self.process.pid, signal.SIGSTOP)
            self.limit = 0.2
        elif fault == "dies":
            self.process.kill()
        return super().ask("what it does not know" if fault == "refuses" else request)


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_a_worker_that_fails_costs_its_own_figures_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.__main__.Worker", Faulty)
    out = tmp_path / "results.json"
    run([dataclasses.replace(TINY[0], only=("chunked",)), TINY[1]], ("naive", "chunked"), out, rounds=2)
    psc, scl = json.loads(out.read_text())["cases"]
    assert "exit code -9" in scl["contenders"]["reference"]["absent"]
    assert scl["contenders"]["chunked"] == {"absent": "KeyError: 'what it does not know'"}
    assert scl["product"] == {"absent": "no answer in 0.2 s"}

    assert "KeyError" in psc["contenders"]["reference"]["absent"]
    assert "exit code -9" in psc["product"]["absent"]
    assert psc["contenders"]["chunked"]["failed"] == dict.fromkeys(("forward", "forward+backward"), "no answer in 0.2 s")
    assert psc["contenders"]["naive"]["unchecked"] == "the reference failed" and "failed" not in psc["contenders"]["naive"]
    assert all(psc["contenders"]["naive"]["seconds"][mode]["samples"] >= 2 for mode in ("forward", "forward+backward"))

    printed = capsys.readouterr().err
    assert printed.count("no answer in 0.2 s") == 2 and printed.count("exit code -9") == 2
    table = report.write(out)[1].read_text()
    for reason in (
        "reference: its process ended",
        "the floor's product: no answer",
        "chunked, forward: no answer",
        "not checked: the reference failed",
    ):
        assert reason in table


def test_a_step_whose_memory_went_back_is_warmed_before_it_is_timed(monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    for reserved, back in ((measure.KEPT, False), (measure.KEPT + 1, True)):
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda reserved=reserved: reserved)
        assert measure.released("cuda") == back == bool(emptied)
    runs = []
    assert len(measure.timed(lambda: runs.append(time.sleep(0.06)), "cpu", cold=True)) == len(runs) - 1 == 2


@pytest.mark.parametrize("shards", [1, 5, 40])
def test_shards_part_the_tests(shards):
    parts = []
    for shard in range(shards):
        tests = [types.SimpleNamespace(keywords=(), number=number) for number in range(23)]
        conftest.pytest_collection_modifyitems(types.SimpleNamespace(getoption={"--shard": f"{shard}/{shards}"}.get), tests)
        parts.append([test.number for test in tests])
    assert sorted(number for part in parts for number in part) == list(range(23))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_report_without_matplotlib_is_the_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    run(TINY[1:], ("chunked",), out, rounds=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in report.write(out)] == ["results.json", "results.md"]
    assert "PSC 40 × 128" in (tmp_path / "results.md").read_text()
    assert "no plots" in capsys.readouterr().err
