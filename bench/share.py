"""One file that says what runs where and how fast, for others to read: what ``python -m bench --share`` writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from fastsupcon.__main__ import facts

from .report import write_whole

# From its root or a drive on, but for the last name: messages of failures hold some, and they hold the names of people and machines.
FOLDERS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:~?[/\\][^/\\\s'\":,;()<>]+)+(?=[/\\])[/\\]")
HOME = os.path.expanduser("~")  # goes first: the name of a person may hold a blank, where FOLDERS sees an end


def without_folders(found: object) -> object:
    if isinstance(found, str):
        return FOLDERS.sub("…/", found.replace(HOME, "~") if len(HOME) > 1 else found)
    if isinstance(found, dict):
        return {key: without_folders(value) for key, value in found.items()}
    return [without_folders(value) for value in found] if isinstance(found, list) else found


def write(out: Path, machine: dict, cases: list[dict]) -> None:
    """Whole or not at all. A case holds its figures, its floor, the versions, the commit and the date."""
    said = {"what": "python -m bench --share", "fastsupcon": facts(), "machine": machine, "cases": cases}
    write_whole(out, json.dumps(without_folders(said), indent=1, ensure_ascii=False).encode())
