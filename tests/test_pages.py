"""README and docs/ are true: every python block runs, every command has options that exist, every link leads to a file."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pages
import pytest

from tests.processes import Script

ROOT = pages.ROOT


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.python_blocks(page)], ids=named)
def test_python_blocks_run(page, tmp_path):
    done = Script(pages.play, str(page), folder=tmp_path, apart=True)  # a process of its own, so that a page changes nothing for another
    text, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    if missing := text.splitlines()[-1].split()[1:]:
        pytest.skip(f"not here: {', '.join(missing)}; the blocks that need none of these ran")


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_links_lead_to_files(page):
    assert not [str(path) for path in pages.files_linked_to(page) if not path.exists()]


def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[list[str]], object]]:
    """What reads the arguments of each program, and ends or raises where one is wrong. Data and runs that they name need not exist."""
    tyro = pytest.importorskip("tyro")
    pytest.importorskip("rich")
    sys.path[:0] = [str(ROOT / "train"), str(ROOT)]
    import command_line
    import compare
    import data
    import features
    import predict
    import settings
    import tables

    import bench.suite

    monkeypatch.setattr(command_line, "check_root", lambda *_: None)
    monkeypatch.setattr(data, "check_root", lambda *_: None)
    monkeypatch.setattr(settings, "read", lambda _: settings.recipe("digits", "hybrid-sc"))
    return {
        "train/hybrid.py": command_line.parse,
        "train/predict.py": predict.parse,
        "train/features.py": features.parse,
        "train/tables.py": lambda words: tyro.cli(tables.Given, args=words),
        "train/compare.py": lambda words: tyro.cli(compare.Compare, args=words),
        "bench": lambda words: tyro.cli(functools.wraps(bench.suite.main)(lambda *_, **__: None), args=words),
    }


@pytest.mark.parametrize("page", [page for page in pages.PAGES if pages.commands(page)], ids=named)
def test_commands_can_be_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    known, missing = parsers(monkeypatch), ""
    for words in pages.commands(page):
        said = " ".join(words)
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        program, *words = words
        if program == "torchrun":
            words = words[next(n for n, word in enumerate(words) if word.endswith(".py")) :]
            program = "python"
        if program == "pip":
            for option, value in pairwise(words):
                assert option != "-r" or (ROOT / value).exists(), said
        elif program == "python" and words[0] == "-m":
            module, words = words[1], words[2:]
            if module in known:
                known[module](words)
            else:
                assert module == "build" or importlib.util.find_spec(module), said  # the one that need not be here
                assert all((ROOT / word).exists() for word in words if word.endswith(".py")), said
        elif program == "python" and not words[0].startswith("-"):
            script, *words = words
            assert (ROOT / script).exists(), said
            try:
                known.get(script, list)(words)
            except ImportError as error:  # a network of timm's where that is not installed
                missing = f"{said}: {error}"
    if missing:
        pytest.skip(missing)
