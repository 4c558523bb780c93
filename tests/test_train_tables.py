"""Tables of runs: what they hold, what they cost, and that they go on where they were stopped."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import compare
import hybrid
import settings
import tables
from methods import METHODS
from run import Run
from tables import Given

from tests.processes import Script

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["methods", "ablation"])
def test_every_row_is_a_run(name, tmp_path):
    runs = tables.planned(Given(name, seeds=1), tables.TABLES[name], tmp_path)
    assert len(runs) == sum(len(one.rows) for one in tables.TABLES[name])
    assert len({config.records.out for _, _, config in runs}) == len(runs)
    for one in tables.TABLES[name]:
        assert set(one.against) <= set(one.rows)


def test_baselines_are_in_every_table_of_methods():
    for one in (*tables.METHOD_TABLES, *tables.CIFAR10_TABLES, *tables.BUDGET_TABLES):
        assert {"ce-balanced", "logit-adjustment"} <= set(one.rows)


def test_equal_images_and_equal_updates_are_equal(tmp_path):
    """By the plans of every epoch. A method's epochs are whole, and one of five passes is two hundredths of the whole."""
    images, updates = {}, {}
    for title, name, config in tables.planned(Given("methods", seeds=1), tables.METHOD_TABLES, tmp_path):
        run, seen = Run(config, hybrid.checked_data(config.images)), 0
        for run.epoch in range(config.optimiser.epochs):
            run.begin_epoch()
            seen += run.plan.indices.numel()
        images.setdefault(title, {})[name] = seen
        updates.setdefault(title, {})[name] = run.steps * config.optimiser.epochs
    assert images["Equal images"].keys() == METHODS.keys()
    assert all(abs(seen - 51_200) <= 0.02 * 51_200 for seen in images["Equal images"].values()), images
    assert set(updates["Equal updates"].values()) == {400}


def test_a_run_of_two_tables_is_trained_once(tmp_path, monkeypatch):
    again = [
        tables.Table("A", {"one": {"epochs": 1}}),
        tables.Table("B", {"same": {"epochs": 1}, "other": {"epochs": 1, "lr": 0.2}}, ("same",)),
    ]
    monkeypatch.setitem(tables.TABLES, "ablation", again)
    results = tables.fill(Given("ablation", seeds=2, out=tmp_path))
    assert [path.parent.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("metrics.json"))] == [
        f"{row}/seed-{seed}" for row in ("a/one", "b/other") for seed in (100, 101)
    ]
    assert results["A"]["one"] == results["B"]["same"] and results["B"]["other"] != results["B"]["same"]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:] == [
        "| one", "| ", "| same", "| other",
    ]  # fmt: skip


SMALL = ["--set", "lr", "0.05", "0.1", "--set", "nesterov", "True", "--method", "hybrid-psc", "--device", "cpu", "--seeds", "1"]


def start(*arguments) -> Script:
    return Script(ROOT / "train" / "tables.py", *arguments)


def test_a_sweep_is_stopped_and_goes_on(tmp_path):
    """SIGTERM to the first process: both runs leave a checkpoint and go on from it."""
    out = tmp_path / "sweep"
    process = start("sweep", *SMALL, "--jobs", "2", "--shorten", "0.2", "--out", str(out))
    deadline = time.monotonic() + 120
    while len(logs := list(out.rglob("log.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    done = {log: log.read_text().splitlines() for log in logs}
    assert any(len(lines) < 16 for lines in done.values()) and not (out / "results.md").exists()
    again = start("sweep", *SMALL, "--jobs", "2", "--shorten", "0.2", "--out", str(out))
    text = again.communicate(timeout=120)[0]
    assert again.returncode == 0, text
    for log, lines in done.items():
        assert log.read_text().splitlines()[: len(lines)] == lines and len(log.read_text().splitlines()) == 16
    found = json.loads((out / "results.json").read_text())["tables"]["hybrid-psc on digits"]
    assert list(found) == ["lr 0.05, nesterov True", "lr 0.1, nesterov True"]
    assert [one[0]["config"]["optimiser"]["lr"] for one in found.values()] == [0.05, 0.1]
    assert "| lr 0.05, nesterov True | 80 | " in (out / "results.md").read_text()
    assert (out / "hybrid-psc-on-digits" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_more_runs_than_a_pipe_holds_is_stopped(tmp_path):
    """Its tasks, some kilobytes each, are taken by nobody any more."""
    process = start("sweep", *SMALL[:-1], "100", "--jobs", "2", "--out", str(tmp_path))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("log.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, text


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_run_says_is_wrong_is_told(tmp_path, jobs):
    given = ["--set", "lr", "1e30", "--shorten", "0.1", "--seeds", "2", "--jobs", jobs, "--device", "cpu"]
    if jobs == "2":  # as a user starts it: its jobs are processes of their own from the beginning, which the warm server's are not
        command = [sys.executable, str(ROOT / "train" / "tables.py"), "sweep", *given, "--out", str(tmp_path)]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
        text = process.stdout
    else:
        process = start("sweep", *given, "--out", str(tmp_path))
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "not finite" in text and "Traceback" not in text


def test_a_row_that_one_table_has_is_enough(tmp_path):
    runs = tables.planned(Given("methods", seeds=1, only=("bcl", "ours")), tables.METHOD_TABLES, tmp_path)
    assert [(title, name) for title, name, _ in runs] == [("Equal images", "bcl"), ("Equal images", "ours"), ("Equal updates", "ours")]


def test_how_often_a_run_is_evaluated(tmp_path):
    """Once in a table, whose last epoch counts; in a sweep as it says, and else ten times, of which validation chooses."""

    def every(given):
        return {config.records.eval_every for _, _, config in tables.planned(given, tables.tables_of(given), tmp_path)}

    assert every(Given("ablation", seeds=1, only=("reverse",))) == {53}
    assert every(Given("sweep", seeds=1, set=(("eval_every", "5"), ("validation", "0.1")))) == {5}
    assert every(Given("sweep", seeds=1, set=(("validation", "0.1"),))) == {None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Given("methods", set=(("lr", "1"),)), "act on table 'sweep' alone"),
        (Given("sweep"), "set must name a setting"),
        (Given("sweep", set=(("lr",),)), "set must name lr once, with values that differ, got none"),
        (Given("sweep", set=(("lr", "0.1"), ("lr", "0.2"))), "set must name lr once"),
        (Given("sweep", set=(("lr", "0.1", "0.1"),)), "set must name lr once, with values that differ, got 0.1 0.1"),
        (Given("sweep", method="ce", set=(("hidden", "8", "16"),)), "hidden acts on a feature_loss alone, got feature_loss 'none'"),
        (Given("methods", seeds=0), "seeds must be positive, got 0"),
        (Given("methods", jobs=-2), "jobs must be positive, got -2"),
        (Given("methods", shorten=math.nan), "shorten must be positive, got nan"),
        (Given("methods", root=Path("IMAGES")), "root has no meaning for data 'digits'"),
        (Given("cifar10", root=Path("nowhere")), "root nowhere must be a folder, got nothing there"),
        (Given("sweep", set=(("epochs", "many"),)), "set epochs must be of type int, got 'many'"),
        (Given("sweep", set=(("nesterov", "yes"),)), "set nesterov must be of type bool, got 'yes'"),
        (Given("sweep", set=(("nonsense", "1"),)), "no such setting: nonsense"),
        (Given("sweep", set=(("seed", "1"),)), "set must not name seed"),
        (Given("methods", only=("nonsense",)), "only must be among"),
        (Given("methods", only=()), "only must be among .*, got none"),
    ],
)
def test_what_cannot_be_a_table(given, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        tables.planned(given, tables.tables_of(given), tmp_path)


def test_a_sweep_sets_what_the_command_line_would(tmp_path):
    given = (("ema", "0.9", "None"), ("milestones", "0.5,0.75"), ("optimiser", "adamw"), ("classifier_batch", "64"))
    assert {name: [tables.value_of(name, text) for text in texts] for name, *texts in given} == {
        "ema": [0.9, None], "milestones": [(0.5, 0.75)], "optimiser": ["adamw"], "classifier_batch": [64],
    }  # fmt: skip


def test_reported_stands_beside_ours():
    def run(method, data):
        return [{"config": settings.as_json(settings.recipe(data, method))}]

    beside = tables.reported_of({"a": run("hybrid-sc", "cifar10-lt"), "b": run("ours", "cifar10-lt"), "c": run("hybrid-sc", "digits")})
    assert beside.keys() == {"a"} and beside["a"].startswith("81.4")
    assert compare.seed({"config": settings.as_json(settings.recipe("digits", "ce"))}) == 0
