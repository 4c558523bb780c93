"""The benchmark suite runs, records what its reports need, and its reports are made from what it recorded. Nothing here times."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from tests import naive

for package in ("matplotlib", "rich", "tyro"):
    pytest.importorskip(package, reason=f"{package} (pip install -r bench/requirements.txt) is not installed")

import tyro  # noqa: E402

from bench import gpu, measure, page, report, share, suite  # noqa: E402
from bench.cases import cpu_cases, gpu_cases, quick_cases  # noqa: E402
from bench.contenders import CONTENDERS, OPERATORS, ROWS, Case, at_once  # noqa: E402
from bench.suite import run  # noqa: E402
from fastsupcon.__main__ import facts  # noqa: E402
from tests.processes import Script, warm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
AWAY = "/home/Jo Doe"  # a home with a blank
RESULTS = sorted((ROOT / "bench/results").glob("[cg]pu-*.json"))  # of python -m bench
TINY = [Case("scl", 64, 128), Case("psc", 40, 128, 12)]
ONE_POSITIVE = Case("psc all", 40, 128, 12)


def test_a_run_is_recorded_and_reported(tmp_path, capsys, forked):
    out = tmp_path / "results.json"
    run([TINY[0], dataclasses.replace(TINY[1], threads=2)], ("naive", "chunked", "inf-cl"), out, rounds=2)
    said = capsys.readouterr().err.splitlines()
    assert "2 cases (SCL, PSC; 40 to 64 rows), about a minute" in said[0] and said[1].endswith("measured: naive, chunked")
    assert "left out: inf-cl: " in said[2] and said[3].endswith(f"results: {out}, after each case")
    steps = [line.split(": ")[-1] for line in said if " SCL 64 × 128, float32, 1 thread: " in line and " of 2: " not in line]
    assert steps == ["reference", "naive", "chunked", "product", "2 rounds"]
    figures = [line.split(" of 2: ")[1] for line in said if " of 2: " in line]
    assert figures == [report.in_a_line(entry) for entry in reversed(json.loads(out.read_text())["cases"])]
    assert "forward+backward, ms: naive " in figures[0]
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
            assert (report.AFTER in found["seconds"]) == (entry["case"]["threads"] > 1)
            for spread in found["seconds"].values():
                assert spread["samples"] >= 2
                assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["max"]
    assert entries[1]["floor_flops"] == {"forward": 64 * 64 * 128, "forward+backward": 4 * 64 * 64 * 128}

    run(TINY[:1], ("chunked",), out, rounds=1)  # a second piece replaces its case and keeps the other
    merged = {entry["case"]["loss"]: list(entry["contenders"]) for entry in json.loads(out.read_text())["cases"]}
    assert merged["scl"] == ["chunked"] and "naive" in merged["psc"]

    written = report.write(out)
    assert {path.name for path in written} == {"results.json", "results.md", "results-time.png", "results-memory.png"}
    table = written[1].read_text()
    assert "SCL 64 × 128, float32, 1 thread" in table and report.AFTER in table and "inf-cl: serves scl alone" in table


def test_the_cases_of_the_presets_are_rows_of_the_table():
    presets = [cpu_cases(2), gpu_cases(), quick_cases("cpu"), quick_cases("cuda")]
    assert all(case.loss in ROWS for cases in presets for case in cases)
    assert {case.loss for case in cpu_cases(2)} == set(ROWS) - {"clip"}


@pytest.mark.parametrize("loss", list(ROWS))
def test_every_row_of_the_table_is_a_case(loss):
    """Also of all those that only the preset of a CPU holds."""
    case = Case(loss, 48, 16, 12 if ROWS[loss].has_prototypes else {"cross": 20, "clip": 48}.get(loss, 0))
    features, *rest = case.inputs()
    assert features.numel() == case.rows * case.depth
    assert all(torch.equal(x, y) for x, y in zip(rest, case.inputs()[1:], strict=True) if x is not None)
    if loss in OPERATORS:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(case.rows))
    reference = measure.float64_reference(case)
    for name in ("naive", "chunked"):
        errors = measure.errors(case, CONTENDERS[name].build(case), reference)
        assert errors["value_error"] < 1e-6 and errors["gradient_error"] < 2e-6


def test_a_file_of_another_machine_is_not_added_to(tmp_path):
    out = tmp_path / "results.json"
    before = json.dumps({"machine": {"processor": "abacus", "cores": 1, "device": "cpu"}, "cases": []})
    out.write_text(before)
    with pytest.raises(SystemExit, match="abacus"):
        run(TINY, ("chunked",), out, rounds=1)
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, TINY[0]) for name in ("naive, warm heap", "torch.compile", "pytorch-metric-learning", "chunked", "cut-cross-entropy")),
        *((name, ONE_POSITIVE) for name in ("F.linear_cross_entropy", "chunked", "cut-cross-entropy")),
    ],
    ids=lambda of: of if isinstance(of, str) else of.loss,
)
def test_a_contender_computes_the_loss(name, case, monkeypatch):
    """On the same inputs, in this process; a kernel that wants a GPU is stood in for by its definition in plain PyTorch."""
    peer = types.ModuleType("cut_cross_entropy")
    peer.linear_cross_entropy = lambda e, c, targets, filter_eps, reduction="mean": F.cross_entropy(e @ c.T, targets, reduction=reduction)
    if name == "cut-cross-entropy":
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", peer)
    elif reason := CONTENDERS[name].absent(case):
        pytest.skip(reason)
    monkeypatch.setattr(measure, "extra_bytes", lambda step, device: step() and 0)
    if name == "torch.compile":  # the compiler itself is the suite's affair
        monkeypatch.setattr("torch.compile", lambda loss, **options: loss)
    loss, _, _ = measure.prepare(case, name, Path())
    answer = measure.errors(case, loss, measure.float64_reference(case))
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


def report_of(results):
    """``python -m bench.report results``, whose colours and fonts no other test has set."""
    sys.argv = ["bench.report", results]
    runpy.run_module("bench.report", run_name="__main__")


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_the_reports_command_reads_earlier_results(results, tmp_path):
    out = Path(shutil.copy(results, tmp_path / "results.json"))
    written = Script(report_of, str(out), apart=True)
    text, errors = written.communicate()
    assert written.returncode == 0, errors
    kinds = ["time", *(["graph"] if results.stem.startswith("gpu") else []), "memory"]
    assert [Path(name).name for name in text.split()[2:]] == [f"results-{kind}.png" for kind in kinds]
    assert all((tmp_path / f"results-{kind}.png").read_bytes().startswith(b"\x89PNG") for kind in kinds)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == results.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", page.PAGES)
def test_a_pages_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.filled(text) == text, f"{name} has other tables than bench/results: python -m bench.page"


def test_the_benchmark_page_has_every_table():
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert {name for _, name, *_ in page.BLOCK.findall(text)} == set(page.TABLES)
    assert (
        page.filled("a\n<!-- table: readme -->\nold\n<!-- end -->\nb") == f"a\n<!-- table: readme -->\n\n{page.readme()}\n\n<!-- end -->\nb"
    )
    with pytest.raises(SystemExit, match="no table is called x; there are readme, "):
        page.filled("<!-- table: x -->\n<!-- end -->")


@pytest.mark.parametrize("name", page.NOW)
def test_the_command_beside_a_figure_measures_its_case_alone(name, monkeypatch, tmp_path):
    found, asked = page.results(name), []
    monkeypatch.setattr(suite, "run", lambda cases, *rest, **options: asked.append(cases))
    monkeypatch.setattr(suite, "cores", lambda: found["machine"]["cores"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for entry in found["cases"]:
        words = shlex.split(page.command(entry["case"], found["machine"]["cores"]))
        assert words[:3] == ["python", "-m", "bench"]
        tyro.cli(suite.main, args=[*words[3:], "--out", str(tmp_path / "none.json")])
    assert asked == [[Case(**entry["case"])] for entry in found["cases"]]


@pytest.mark.parametrize("rows", [1, 5, 41, 100])
def test_pscs_reference_by_blocks_is_the_direct_one(rows, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK", 12 * rows + 7)
    case = Case("psc", 41, 16, 12)
    features, labels, prototypes = (x.detach().double().requires_grad_() if x.is_floating_point() else x for x in case.inputs())
    loss = naive.psc_loss(features, labels, prototypes, **case.options)
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


@pytest.fixture
def forked(monkeypatch):
    """Workers that need not import torch. test_an_interrupted_run_reports_what_it_has has those that everybody has."""
    monkeypatch.setattr(measure, "multiprocessing", types.SimpleNamespace(get_context=lambda method: warm()))


class Faulty(measure.Worker):
    """A worker that does at a request what FAULTS says."""

    started: ClassVar = []

    def __init__(self, name, *options):
        super().__init__(name, *options)
        self.name = name
        self.started.append(name)

    def send(self, request, *arguments):
        if request == "prepare":
            self.loss = arguments[0].loss
        fault = FAULTS.get((self.loss, self.name, request))
        if fault == "hangs":
            os.kill(self.process.pid, signal.SIGSTOP)
            self.limit = 0.2
        elif fault == "dies":
            self.process.kill()
        super().send("what it does not know" if fault == "refuses" else request, *arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
@pytest.mark.parametrize("keep", [False, True])
def test_a_worker_that_fails_costs_its_own_figures_alone(tmp_path, monkeypatch, capsys, forked, keep):
    monkeypatch.setattr("bench.suite.Worker", Faulty)
    monkeypatch.setattr(Faulty, "started", [])
    out = tmp_path / "results.json"
    run([dataclasses.replace(TINY[0], only=("chunked",)), TINY[1]], ("naive", "chunked"), out, rounds=2, keep=keep)
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


def test_processes_kept_for_all_cases_are_replaced_where_they_failed(tmp_path, monkeypatch, forked):
    """naive dies in a turn of the first case and chunked, which only refuses one, is replaced as well; the others stay."""
    monkeypatch.setattr("bench.suite.Worker", Faulty)
    monkeypatch.setattr(Faulty, "started", [])
    monkeypatch.setitem(FAULTS, ("simclr", "naive", "forward"), "dies")
    monkeypatch.setitem(FAULTS, ("simclr", "chunked", "forward"), "refuses")
    cases = [Case("simclr", 64, 16), Case("mpsc", 40, 16, 12), Case("scl raw rows", 64, 16)]
    run(cases, ("naive", "chunked"), tmp_path / "results.json", rounds=2, keep=True)
    assert sorted(Faulty.started) == ["chunked", "chunked", "naive", "naive", "product", "reference"]
    for entry in json.loads((tmp_path / "results.json").read_text())["cases"]:
        naive, chunked = (entry["contenders"][name] for name in ("naive", "chunked"))
        assert naive["gradient_error"] < 2e-6 and chunked["gradient_error"] < 2e-6
        if entry["case"]["loss"] != "simclr":
            assert {"forward", "forward+backward"} == set(naive["seconds"]) == set(chunked["seconds"])
        else:
            assert set(naive["failed"]) == {"forward", "forward+backward"} and set(chunked["failed"]) == {"forward"}
            assert set(chunked["seconds"]) == {"forward+backward"} and not naive["seconds"]


def test_no_case_is_begun_without_time(tmp_path, capsys):
    run(TINY, ("chunked",), tmp_path / "results.json", rounds=1, seconds=0)
    assert capsys.readouterr().err.count("not begun in 0 s") == 2 and not (tmp_path / "results.json").exists()


def test_what_is_shared_is_whole_and_names_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(share, "HOME", AWAY)
    entry = page.results("cpu-avx2-zen3")["cases"][0]
    failure = f"OSError: {Path.home()}/private/a.py and '{ROOT}/b.so' and C:\\Users\\me\\c.dll; 12 GB/s; {AWAY}/private/d.so"
    entry = entry | {"contenders": entry["contenders"] | {"chunked": {"absent": failure}}}
    asked = []

    def measured(cases, names, out, rounds, **options):
        asked.append((cases, rounds))
        return [entry]

    monkeypatch.setattr(suite, "run", measured)
    suite.main("cpu", share=True, rows=(256,), out=tmp_path / "mine.json")
    assert asked == [([case for case in quick_cases("cpu") if case.rows == 256], 3)]  # --share is --quick, and no option is ignored
    shared = json.loads((tmp_path / "mine-share.json").read_text(encoding="utf-8"))
    assert shared["fastsupcon"] == share.without_folders(facts()) and shared["fastsupcon"]["devices"][0]["dtypes"]["float32"]["auto"]
    assert shared["machine"] == suite.machine("cpu") and shared["cases"][0]["floor_flops"] == entry["floor_flops"]
    assert shared["cases"][0]["contenders"]["chunked"] == {"absent": "OSError: …/a.py and '…/b.so' and …/c.dll; 12 GB/s; …/d.so"}
    text = (tmp_path / "mine-share.json").read_text(encoding="utf-8")
    assert not [name for name in (str(Path.home()), str(ROOT), platform.node()) if len(name) > 1 and name in text]
    assert f"{tmp_path / 'mine-share.json'}: attach this file" in capsys.readouterr().out

    monkeypatch.setattr(suite, "run", lambda *rest, **options: [])
    with pytest.raises(SystemExit, match="--share: no case was measured in --seconds 0"):
        suite.main("cpu", share=True, seconds=0, out=tmp_path / "none.json")
    monkeypatch.setattr(suite, "run", lambda *rest, **options: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        suite.main("cpu", share=True, out=tmp_path / "none.json")
    assert "interrupted: no case was complete, nothing was written to be shared" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine-share.json"]


def test_what_is_missing_is_named_in_a_line():
    code = "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('bench', run_name='__main__')"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 1 and said.stderr.splitlines()[1:] == [
        "python -m bench needs tyro, which is not installed: pip install . -r bench/requirements.txt"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a shell")
def test_a_reader_that_goes_ends_it_quietly(tmp_path):
    """`python -m bench 2>&1 | head -2`: what it would say next finds nobody."""
    command = [
        sys.executable,
        "-m",
        "bench",
        "cpu",
        "--loss",
        "scl",
        "--rows",
        "256",
        "--contenders",
        "chunked",
        "--out",
        tmp_path / "a.json",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "python -m bench: loading torch …\n"
    process.stdout.close()
    assert process.wait(120) == 141


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_an_interrupted_run_reports_what_it_has(tmp_path):
    """By a signal to all of its processes, as a terminal sends it."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench", "cpu", "--loss", "scl", "--rows", "256", "512", "--threads", "1", "--contenders", "chunked"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a process started here ignores it where this one does
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, start_new_session=True, **pipes)
    while not out.exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 130 and "results.md" in said
    assert "Traceback" not in complained and complained.splitlines()[-1] == f"interrupted: {out} holds the cases that were complete"
    (entry,) = json.loads(out.read_text())["cases"]
    found = entry["contenders"]["chunked"]
    assert found["gradient_error"] < 2e-6 and found["seconds"].keys() == {"forward", report.BOTH} and "seconds" in entry["product"]
    assert out.with_suffix(".md").exists()


def test_what_fits_into_memory_prepares_at_once(monkeypatch):
    case = Case("scl", 65536, 128, dtype="bfloat16")  # 8 GiB a matrix
    monkeypatch.setattr("bench.contenders.memory", lambda device: 200 * 2**30)
    fitting = ["reference", "naive", "chunked", "cuda"]
    assert at_once([*fitting, "torch.compile", "triton"], case) == [[*fitting, "torch.compile", "triton"]]  # 72 + 24 of 100 GiB
    assert at_once([*fitting, "naive", "triton"], case) == [fitting, ["naive", "triton"]]


class Clock:
    """Stands in for the module time: it stands still but for what a step asks of it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_what_runs_before_a_step_is_not_timed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    seconds = measure.timed(lambda: clock.sleep(0.01), "cpu", before=lambda: clock.sleep(0.05))
    assert seconds == pytest.approx([0.01, 0.01])


def test_a_step_whose_memory_went_back_is_warmed_before_it_is_timed(monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    for reserved, back in ((measure.KEPT, False), (measure.KEPT + 1, True)):
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda reserved=reserved: reserved)
        assert measure.released("cuda") == back == bool(emptied)
    clock, runs = Clock(), []
    monkeypatch.setattr(measure, "time", clock)
    assert len(measure.timed(lambda: runs.append(clock.sleep(0.06)), "cpu", cold=True)) == len(runs) - 1 == 2


def runs(process: int) -> bool:
    """Whether it does not end: a process that was killed may still be there for a moment. What the tests leave would run for a minute."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_the_gpu_driver_survives_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "KEPT", 1000)
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)

    def part(name: str, code: str, limit: float = 30, **options) -> gpu.Part:
        return gpu.Part(name, limit, [sys.executable, "-c", code], **options)

    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    reports = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('reported')"
    says = "import os; print(os.environ['SAID'])"
    stages = [
        [part("hangs", deaf, 1), part("reports", reports, 1), part("good", says, environment={"SAID": "yes"})],
        [part("fails", "import sys; sys.exit('wrong')")],
        [part("talks", "for i in range(100_000): print(i)")],
        [part("absent", "", program="no-such-program")],
        [part("leaves", "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)")],
    ]
    assert not gpu.drive(stages, tmp_path, tmp_path)
    results = {entry["part"]: entry["result"] for entry in json.loads((tmp_path / "parts.json").read_text())}
    assert results == {
        "hangs": "stopped at its limit",
        "reports": "stopped at its limit",
        "good": "passed",
        "fails": "failed with status 1",
        "talks": "passed",
        "absent": "skipped: no no-such-program on the PATH",
        "leaves": "passed",
    }
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 3000 and all(word in log for word in ("deaf", "reported", "yes", "wrong", "99999", "== absent"))
    assert "99999" in capsys.readouterr().out
    assert not runs(int((tmp_path / "leaves.log").read_text()))


def test_a_variant_is_timed_in_a_copy_of_the_package(tmp_path):
    extension = tmp_path / "two-stages.so"
    extension.write_bytes(b"an extension")
    ((part,),) = gpu.variants(tmp_path / "out", tmp_path / "scratch", [extension])
    (placed,) = (path for path in (part.folder / "fastsupcon").glob("_C*") if path.suffix != ".pyi")
    assert placed.read_bytes() == b"an extension" and part.command[-2:] == [str(tmp_path / "out" / "two-stages.json"), "cuda"]
    command = [sys.executable, "-c", "import bench; print(bench.__file__)"]
    imported = subprocess.run(command, cwd=part.folder, capture_output=True, text=True)
    assert imported.stdout.strip() == str(part.folder / "bench" / "__init__.py")


@pytest.mark.skipif(sys.platform == "win32", reason="stops processes by signals")
def test_the_gpu_driver_ends_its_parts_when_it_is_ended(tmp_path):
    """One that goes on would disturb what is measured next."""
    file = tmp_path / "pid"
    part = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import sys; from pathlib import Path; from bench import gpu\n"
    code += f"gpu.drive([[gpu.Part('long', 50, [sys.executable, '-c', {part!r}])]], Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (file.exists() and file.read_text()):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(20) != 0
    assert not runs(int(file.read_text()))


def test_what_a_part_has_written_is_kept_when_its_limit_ends_it(tmp_path):
    """Its folders are not: a call's results are a few files."""
    where, out = tmp_path / "table", tmp_path / "out"
    (where / "runs").mkdir(parents=True)
    out.mkdir()
    code = f"import pathlib, time; pathlib.Path({str(where / 'results.md')!r}).write_text('half'); time.sleep(60)"
    parts = [gpu.Part("budget", 3, [sys.executable, "-c", code], results=where)]
    assert not gpu.drive([parts], out, tmp_path)
    assert (out / "budget-results.md").read_text() == "half" and not (out / "runs").exists()


@pytest.mark.parametrize("arguments", [["no-such-part"], ["variants"], ["train"], ["--data", "D"], ["ladder", "--extensions", "A.so"]])
def test_the_gpu_driver_refuses_what_it_cannot_run(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_a_report_without_matplotlib_is_the_table(tmp_path, monkeypatch, capsys):
    out = Path(shutil.copy(RESULTS[0], tmp_path / "results.json"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in report.write(out)] == ["results.json", "results.md"]
    assert "PSC 1,024 × 128" in (tmp_path / "results.md").read_text()
    assert "no plots" in capsys.readouterr().err
