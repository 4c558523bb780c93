"""Builds fastsupcon._C with CMake. The rest of the metadata is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def lasting_pybind11(build: Path) -> Path:
    """CMake's folder of a copy of pybind11 that stays in the build folder. The path of its headers is in every compile command, and in
    pip's build environment it is another one each time: nothing would ever count as compiled."""
    copy = build / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        unfinished = build / "pybind11.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(Path(pybind11.get_include()) / "pybind11", unfinished / "include" / "pybind11")
        shutil.copytree(pybind11.get_cmake_dir(), unfinished / "share" / "cmake" / "pybind11")
        unfinished.rename(copy)
    return copy / "share" / "cmake" / "pybind11"


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, which finds nvcc by itself and needs no torch."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        # The cache names the ninja of the last build, which went with pip's build environment, and keeps options that nobody asks for now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        self.spawn(
            [
                "cmake",
                f"-S{Path(__file__).resolve().parent}",
                f"-B{build}",
                "-GNinja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={lasting_pybind11(build)}",
                f"-DFASTSUPCON_OUTPUT_DIRECTORY={target.parent}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ]
        )
        self.spawn(["cmake", "--build", str(build)])
        # Python started in the checkout finds its fastsupcon/ before the installed one, so the extension goes there too.
        checkout = Path(__file__).resolve().parent / "fastsupcon" / target.name
        if checkout != target:
            shutil.copyfile(target, checkout.with_suffix(".new"))
            checkout.with_suffix(".new").replace(checkout)


setup(ext_modules=[Extension("fastsupcon._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
