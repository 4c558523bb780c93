"""What is not installed, too old or broken ends in one line that says what needs it and what brings it."""

import re
import runpy
import sys
from pathlib import Path

import packages
import pytest

from tests.processes import Script

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", [packages.BASE, packages.EXTRA])
def test_the_packages_are_those_of_the_requirement_files(file):
    lines = [line for line in (ROOT / "train" / file).read_text().splitlines() if not line.startswith("#")]
    assert sorted(lines) == sorted(f"{package}>={least}" for package, least, own in packages.PACKAGES.values() if own == file)


def test_a_file_is_named_as_it_is_typed_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for folder, shown in ((ROOT, "train/requirements-extra.txt"), (ROOT / "tests", ROOT / "train" / "requirements-extra.txt")):
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=re.escape(f"pip install -r {shown} or pip install 'timm>=1.0'")):
            packages.need("timm", "network 'resnet50'")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "requirements-extra.txt or pip install 'timm>=1.0'"),
        ("__version__ = '0.6.13'", "timm 1.0 or newer, and 0.6.13 is installed: pip install"),
        ("raise RuntimeError('operator torchvision::nms does not exist\\n')", "the torchvision that is installed does not fit torch "),
        (
            "import nothing_of_this_name",
            "cannot be imported here (ModuleNotFoundError: No module named 'nothing_of_this_name'): pip install",
        ),
        ("raise OSError('libx.so: cannot open')", "cannot be imported here (OSError: libx.so: cannot open): pip install"),
    ],
)
def test_a_package_that_cannot_be_used(tmp_path, monkeypatch, content, message):
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    if content is None:
        monkeypatch.setitem(sys.modules, "timm", None)
    else:
        (tmp_path / "timm.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^network 'resnet50' needs timm") as raised:
        packages.need("timm", "network 'resnet50'")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    sys.modules.pop("timm", None)  # monkeypatch would put it back


def beside(folder: str, script: str) -> None:
    """Runs it where the packages of the folder come first; those that were imported and have images in them are imported anew."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("PIL", "matplotlib", "mpl_toolkits"):
            del sys.modules[name]
    sys.path.insert(0, folder)
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("script", ["hybrid", "tables", "compare", "features", "predict"])
def test_a_script_says_it_before_its_imports(tmp_path, script):
    (tmp_path / "PIL.py").write_text("__version__ = '9.5.0'")
    done = Script(beside, str(tmp_path), str(ROOT / "train" / script) + ".py", apart=True)
    said = done.communicate()[1]
    assert done.returncode == 1 and said.startswith(f"error: python train/{script}.py needs pillow 10.1 or newer, and 9.5.0 is installed")
    assert said.count("\n") == 1
