"""The CPU kernels without Python: their schedules, on aarch64 (under qemu), on Windows (under Wine), by Clang; each
header. Skips where the tools are missing."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-ignored-attributes -pthread"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86 = {"avx2": AVX2, "avx512": AVX512}  # as in csrc/cpu/sources.cmake


def needs(*tools: str) -> None:
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_schedules(tmp_path):
    needs("g++")
    run("g++", *FLAGS.split(), f"-I{ROOT}/csrc", ROOT / "tests/cpu_portable/schedule.cpp", "-o", tmp_path / "check")
    run(tmp_path / "check")


@pytest.mark.parametrize("header", sorted(path.name for path in (ROOT / "csrc/cpu").glob("*.h")))
def test_a_header_compiles_by_itself(header, tmp_path):
    needs("g++")
    (tmp_path / "alone.cpp").write_text(f'#include "cpu/{header}"\n')
    run("g++", *FLAGS.split(), "-Wno-unused-function", "-fsyntax-only", f"-I{ROOT}/csrc", tmp_path / "alone.cpp")


def test_aarch64(tmp_path):
    needs("aarch64-linux-gnu-g++", "qemu-aarch64")
    units = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("pairs", "line", "team", "dispatch", "unit_generic")]
    main = ROOT / "tests/cpu_portable/main.cpp"
    run("aarch64-linux-gnu-g++", *FLAGS.split(), "-static", f"-I{ROOT}/csrc", *units, main, "-o", tmp_path / "check")
    assert run("qemu-aarch64", tmp_path / "check").startswith("instruction set: generic")


def test_windows(tmp_path):
    """Under Wine, which Debian does not put on PATH. GCC does not align AVX's spilled registers on Windows: the generic unit alone."""
    needs("x86_64-w64-mingw32-g++-posix")
    wine = shutil.which("wine64") or shutil.which("wine64", path="/usr/lib/wine")
    if wine is None:
        pytest.skip("not installed: wine64")
    units = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("pairs", "line", "team", "dispatch", "unit_generic")]
    main = ROOT / "tests/cpu_portable/main.cpp"
    run("x86_64-w64-mingw32-g++-posix", *FLAGS.split(), "-static", f"-I{ROOT}/csrc", *units, main, "-o", tmp_path / "check.exe")
    environment = os.environ | {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    done = subprocess.run([wine, tmp_path / "check.exe"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("instruction set: generic"), done.stdout + done.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 instruction sets")
def test_clang(tmp_path):
    needs("clang++")
    units = {"pairs": [], "line": [], "team": [], "dispatch": ["-DFASTSUPCON_X86"], "unit_generic": []} | {
        f"unit_{name}": X86[name] for name in X86
    }
    objects = []
    for name, flags in units.items():
        source, target = ROOT / "csrc/cpu" / f"{name}.cpp", tmp_path / f"{name}.o"
        run("clang++", *FLAGS.split(), "-Wno-unknown-warning-option", *flags, f"-I{ROOT}/csrc", "-c", source, "-o", target)
        objects.append(target)
    run("clang++", *FLAGS.split(), f"-I{ROOT}/csrc", *objects, ROOT / "tests/cpu_portable/main.cpp", "-o", tmp_path / "check")
    run(tmp_path / "check")
