"""The benchmark suite runs, records what its reports need, and its reports are made from what it recorded. Nothing here times."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch.nn.functional as F

for package in ("matplotlib", "rich", "tyro"):
    pytest.importorskip(package, reason=f"{package} (of the [bench] extra) is not installed")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import measure, report  # noqa: E402
from bench.__main__ import run  # noqa: E402
from bench.contenders import CONTENDERS, Case  # noqa: E402

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
