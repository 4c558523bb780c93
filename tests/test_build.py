"""setup.py, with a small project in place of the kernels: what a second build in one checkout does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "setup.py"
CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(small LANGUAGES CXX)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(_C NO_EXTRAS small.cpp)
set_target_properties(_C PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${FASTSUPCON_OUTPUT_DIRECTORY}")
message(STATUS "option: ${OPTION}")
"""


def test_a_second_build_compiles_nothing(tmp_path):
    """Though pip's build environment, with the ninja and the pybind11 of the first, is gone, and so is the folder that an editable install
    gives for what is compiled. Nor does it keep the first's options."""
    pybind11, ninja = pytest.importorskip("pybind11"), shutil.which("ninja")
    pytest.importorskip("setuptools")
    if ninja is None or shutil.which("cmake") is None or not SETUP.exists():
        pytest.skip("cmake, ninja or setup.py are not here")
    checkout = tmp_path / "checkout"
    (checkout / "fastsupcon").mkdir(parents=True)
    for name in (SETUP.name, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SETUP.with_name(name), checkout)
    (checkout / "CMakeLists.txt").write_text(CMAKE)
    (checkout / "small.cpp").write_text("#include <pybind11/detail/common.h>\n")

    def build(arguments: str) -> str:
        overlay = tmp_path / f"overlay{arguments}"
        shutil.copytree(Path(pybind11.__file__).parent, overlay / "pybind11")
        (overlay / "ninja").symlink_to(ninja)
        environment = os.environ | {"PYTHONPATH": str(overlay), "CMAKE_ARGS": arguments}
        environment["PATH"] = f"{overlay}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "setup.py", "build_ext", f"--build-temp={overlay}/thrown-away"]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        shutil.rmtree(overlay)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first, second = build("-DOPTION=asked"), build("")
    assert "option: asked" in first and "Building CXX object" in first
    assert "option: \n" in second and "no work to do" in second
