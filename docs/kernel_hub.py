"""Writes a copy of fastsupcon in the layout of the Kernel Hub: the Triton and plain PyTorch backends, as one variant for every system.

    python docs/kernel_hub.py OUT

Several copies may be loaded into one process, under any name, so the operators are registered under a name of the copy's own. Beside that
the files are those of fastsupcon/, without what needs other packages (integrations/) and without the compiled extension.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastsupcon"
LEFT_OUT = ("__main__.py", "integrations/")


def renamed(text: str, old: str, new: str) -> str:
    if old not in text:
        raise SystemExit(f"error: {PACKAGE} has no {old!r} to replace any more: docs/kernel_hub.py must learn what is there now")
    return text.replace(old, new)


def files() -> tuple[str, dict[str, bytes]]:
    """The copy's name, unique to its content, and its files."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    found = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if not name.startswith(LEFT_OUT)}
    unique = "_fastsupcon_" + hashlib.sha256("".join(found.values()).encode()).hexdigest()[:8]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    operators = renamed(found["operators.py"], 'Library("fastsupcon"', f'Library("{unique}"')
    operators = renamed(operators, "fastsupcon::", f"{unique}::")
    found["operators.py"] = renamed(operators, "torch.ops.fastsupcon,", f"torch.ops.{unique},")
    found["__init__.py"] = renamed(found["__init__.py"], 'version("fastsupcon")', f'"{version}"')
    return unique, {name: text.encode() for name, text in found.items()}


def main(out: Path) -> None:
    unique, found = files()
    variant = out / "build" / "torch-universal"
    shutil.rmtree(variant, ignore_errors=True)
    for name, content in found.items():
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_bytes(content)
    sums = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in sorted(found.items())}
    metadata = {
        "name": "fastsupcon",
        "id": unique,
        "version": 0,  # the Hub's word for: the interface may still change
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": sums},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("error: python docs/kernel_hub.py OUT, the folder of the copy")
    main(Path(sys.argv[1]))
