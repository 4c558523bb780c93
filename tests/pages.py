"""What README and the pages of docs/ hold: python blocks with the packages that they need, commands, links to files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").glob("*.md")])

BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (?=(?:pip|python|torchrun|[A-Z_]+=\S+ pip) )(.*)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def python_blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Each block's source, beginning at the line that it has on the page, and the packages it needs."""
    text = read(page)
    found = [block for block in BLOCK.finditer(text) if block["language"] == "python"]
    return [("\n" * text.count("\n", 0, block.start("text")) + block["text"], (block["needs"] or "").split()) for block in found]


def commands(page: Path) -> list[list[str]]:
    """Of bash blocks and of lines that are indented, each with its words; what `&&` joins is several."""
    text = read(page)
    lines = [line for block in BLOCK.finditer(text) if block["language"] == "bash" for line in block["text"].splitlines()]
    lines += INDENTED.findall(BLOCK.sub("", text))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [each for each in words if each]


def files_linked_to(page: Path) -> list[Path]:
    """Those that links to elsewhere in the repository lead to."""
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", read(page)))
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    return [page.parent / target for target in targets if target]


def run(page: Path) -> set[str]:
    """The python blocks of a page in their order, in one namespace. Returns the packages that are not here, whose blocks are left out."""
    torch.manual_seed(0)
    names: dict = {"__name__": page.stem}
    missing: set[str] = set()
    for source, needs in python_blocks(page):
        absent = {name for name in needs if not (torch.cuda.is_available() if name == "cuda" else importlib.util.find_spec(name))}
        missing |= absent
        if not absent:
            exec(compile(source, str(page), "exec"), names)
    return missing


def play(page: str) -> None:
    """What a process that is a page's own does: the last line that it prints names the packages that are not here."""
    print("missing:", *sorted(run(Path(page))))
