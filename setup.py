"""Builds fastsupcon._C with CMake. The rest of the metadata is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, which finds nvcc by itself and needs no torch."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        self.spawn(
            [
                "cmake",
                f"-S{Path(__file__).resolve().parent}",
                f"-B{build}",
                "-GNinja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
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
