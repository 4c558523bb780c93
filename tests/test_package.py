"""What is handed out: the sdist's files, the description, the requirement files, an install without the compiled extension."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "https://forge.example/somebody/fastsupcon"


def needs_setuptools():
    pytest.importorskip("setuptools", minversion="77", reason="needs tests/requirements.txt")


@pytest.fixture(scope="module")
def setup():
    needs_setuptools()
    spec = importlib.util.spec_from_file_location("fastsupcon_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FASTSUPCON_")} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a build needs, without csrc: nothing here compiles."""
    needs_setuptools()
    to = tmp_path_factory.mktemp("package")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "fastsupcon", to / "fastsupcon", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return to


@pytest.mark.parametrize(
    ("given", "with_address", "without"),
    [
        ("[the guide](docs/start.md#use)", f"[the guide]({ADDRESS}/blob/v1.2/docs/start.md#use)", "the guide"),
        ("a\n\n![b](x/b.png)\n\nc", f"a\n\n![b]({ADDRESS}/raw/v1.2/x/b.png)\n\nc", "a\n\n\n\nc"),
        ("[`SupConLoss`](docs/s.md), [a](b.md)", f"[`SupConLoss`]({ADDRESS}/blob/v1.2/docs/s.md), [a]({ADDRESS}/blob/v1.2/b.md)", None),
        ("[a](https://a.example/b) [c](#d) ![e](https://e.example/f.png)", None, None),
        ("`a[0](b)` and\n```python\nlosses[0](rows)\n```\n", None, None),
    ],
)
def test_description(setup, given, with_address, without):
    assert setup.description(given, ADDRESS, "v1.2") == (with_address or given)
    assert setup.description(given, None, "v1.2") == (without or ("`SupConLoss`, a" if with_address else given))


@pytest.mark.parametrize("address", [ADDRESS, None])
def test_no_link_of_the_readme_is_relative(setup, address):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", setup.description((ROOT / "README.md").read_text(), address, "v1"), flags=re.M | re.S)
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("CMake Error:\n  No CMAKE_CXX_COMPILER could be found.\n", "no C++ compiler that works was found: install one"),
        (
            "  The CMAKE_CXX_COMPILER:\n\n    /none/g++\n\n  is not a full path to an existing compiler tool.\n",
            "no C++ compiler that works was found: install",
        ),
        (
            '  The C++ compiler\n\n    "/none/c++"\n\n  is not able to compile a simple test program.\n',
            "no C++ compiler that works was found: install",
        ),
        ("CMake Error: fastsupcon: /none/nvcc does not work: CMakeFiles/", "nvcc failed (see above): CMAKE_ARGS="),
        (
            "FAILED: [code=1] CMakeFiles/x.dir/csrc/cuda/plan.cu.o \nnvcc ...",
            "nvcc failed (see above): CMAKE_ARGS=-DFASTSUPCON_NO_CUDA=ON leaves",
        ),
        (
            "CMake Error\n  fastsupcon: /usr/bin/nvcc does not work: ...",
            "nvcc failed (see above): CMAKE_ARGS=-DFASTSUPCON_NO_CUDA=ON leaves",
        ),
        ("FAILED: [code=1] CMakeFiles/_C.dir/csrc/cpu/line.cpp.o \n", "the compiled kernels could not be built (see above): FASTSUPCON"),
    ],
)
def test_a_build_that_fails_says_what_to_do(setup, output, said):
    line = setup.remedy(output)
    assert line.startswith(said) and "FASTSUPCON_NO_EXTENSION=1 installs without" in line and "\n" not in line


def test_without_a_compiler_the_build_ends_in_a_line(copy):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake or ninja is not here")
    pytest.importorskip("pybind11", reason="needs tests/requirements.txt")
    (copy / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.24)\nproject(p LANGUAGES CXX)\n")
    done = command("setup.py", "build_ext", cwd=copy, CXX="/none/g++")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no C++ compiler that works was found: install one that knows C++17")


def test_odd_values_are_refused():
    for name, value in (("FASTSUPCON_NO_EXTENSION", "maybe"), ("FASTSUPCON_REPOSITORY", "somebody/fastsupcon")):
        done = command("setup.py", "--version", **{name: value})
        assert done.returncode == 1 and done.stderr.startswith(f"error: {name} must be") and repr(value) in done.stderr


def test_without_the_extension_the_wheel_is_for_every_system(copy):
    """In a checkout where an earlier build left a module that is gone, and an extension."""
    gone = copy / "build" / "lib" / "fastsupcon" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    extension = copy / "fastsupcon" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension.write_bytes(b"")
    done = command("setup.py", "-q", "bdist_wheel", cwd=copy, FASTSUPCON_NO_EXTENSION="1", FASTSUPCON_REPOSITORY=ADDRESS)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").iterdir()
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert wheel.name == f"fastsupcon-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"fastsupcon-{version}.dist-info/METADATA").decode()
    package = [path.relative_to(ROOT) for path in (ROOT / "fastsupcon").rglob("*") if path.suffix in (".py", ".pyi", ".typed")]
    assert found == {path.as_posix() for path in package} and not extension.exists()
    assert f"Project-URL: Source, {ADDRESS}\n" in metadata and "Provides-Extra" not in metadata

    # It runs, and says without a warning why there are no compiled kernels.
    install = copy / "install"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(install)
    told = command("-W", "error", "-m", "fastsupcon", cwd=install)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"fastsupcon {version},")
    assert "built: this installation is without the compiled extension (FASTSUPCON_NO_EXTENSION" in told.stdout


def test_the_sdist_holds_what_git_holds(tmp_path):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    needs_setuptools()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    held = {name for name in listed if name and (ROOT / name).exists()}
    done = command("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr
    sdist = {name for name in (tmp_path / "fastsupcon.egg-info/SOURCES.txt").read_text().splitlines() if ".egg-info/" not in name}
    assert sdist == held


def test_requirement_files():
    """Each line is a requirement or another of the files."""
    requirements = pytest.importorskip("packaging.requirements")
    for file in ("train/requirements.txt", "train/requirements-extra.txt", "tests/requirements.txt", "bench/requirements.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line.startswith("-r "):
                assert (ROOT / file).parent.joinpath(line[3:]).is_file()
            elif not line.startswith("#"):
                assert requirements.Requirement(line).specifier or line == "ninja"


def test_a_copy_for_the_kernel_hub(tmp_path):
    """Loaded from disk as the Hub's loader does, under a name of its own, beside the package: the same loss and gradient."""
    done = command("docs/kernel_hub.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    variant = tmp_path / "build" / "torch-universal"
    script = """
import importlib.util, json, sys, torch, fastsupcon
from pathlib import Path
variant = Path(sys.argv[1])
unique = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(unique, variant / "__init__.py")
copy = sys.modules[unique] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copy)
rows = torch.randn(16, 2, 8, requires_grad=True)
found = []
for package in (fastsupcon, copy):
    loss = package.SupConLoss(temperature=0.1, normalize=True, backend="chunked")(rows, torch.arange(16) % 3)
    found.append((loss, *torch.autograd.grad(loss, rows)))
torch.testing.assert_close(*found)
assert hasattr(torch.ops, unique) and copy.SupConLoss is not fastsupcon.SupConLoss
print(copy.__version__)
"""
    told = command("-W", "error::RuntimeWarning", "-c", script, str(variant))
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    newest = re.search(r"^## (\S+) – (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = [re.search(rf"^{name}: (.*)$", citation, re.MULTILINE)[1] for name in ("version", "date-released")]
    assert [version, newest[2]] == [newest[1], cited[1]] and cited[0] == version
