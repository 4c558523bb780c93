"""Builds fastsupcon._C with CMake, unless FASTSUPCON_NO_EXTENSION=1 leaves it out, and makes of README.md what a package index shows. The
rest of the metadata is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]*`)|(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]*)\)", re.M | re.S)
WITHOUT = "FASTSUPCON_NO_EXTENSION=1 installs without the compiled kernels (the Triton and plain PyTorch backends remain)"


def without_extension() -> bool:
    asked = os.environ.get("FASTSUPCON_NO_EXTENSION", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"error: FASTSUPCON_NO_EXTENSION must be 1 (no compiled kernels) or 0, got {asked!r}")
    return asked == "1"


def project_address() -> str | None:
    """By FASTSUPCON_REPOSITORY. A runner's own variables do not count: they name the project of whoever installs there."""
    stated = os.environ.get("FASTSUPCON_REPOSITORY", "")
    if stated and not re.fullmatch(r"https://[^\s/]+/\S*[^\s/]", stated):
        raise SystemExit(f"error: FASTSUPCON_REPOSITORY must be of the form https://HOST/OWNER/NAME, got {stated!r}")
    return stated or None


def description(readme: str, address: str | None, ref: str) -> str:
    """``readme`` for a page without the files beside it: relative links and pictures point to ``address``; without one, links become plain
    text and pictures go."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link["picture"], link["text"], link["target"]
        if link["code"] or re.match(r"[a-z]+:|#", target):
            return link[0]
        if address is None:
            return "" if picture else text
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/{ref}/{target})"

    return LINK.sub(absolute, readme)


def remedy(output: str) -> str:
    """What to do about a build that failed, in a line, by what CMake and ninja said."""
    if re.search("CMAKE_CXX_COMPILER|environment variable CXX|C\\+\\+ compiler\\s+.*\\s+is not able to compile", output):
        return f"no C++ compiler that works was found: install one that knows C++17 (CXX names one), or {WITHOUT}"
    if re.search(r"FAILED: .*\.cu\.o|fastsupcon: .* does not work|CMAKE_CUDA_COMPILER", output):
        return f"nvcc failed (see above): CMAKE_ARGS=-DFASTSUPCON_NO_CUDA=ON leaves the CUDA kernels out, {WITHOUT}"
    return f"the compiled kernels could not be built (see above): {WITHOUT}"


def run(*command: str) -> None:
    """Passes on what the command says as it says it."""
    said = []
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line)
    except OSError as error:
        raise ExecError(f"{command[0]} cannot be run ({error}): {WITHOUT}") from None
    if process.returncode:
        raise ExecError(remedy("".join(said)))


def lasting_pybind11(build: Path) -> Path:
    """CMake's folder of a copy of pybind11 that stays in the build folder. The path of its headers is in every compile command, and in
    pip's build environment it is another one each time: nothing would ever count as compiled."""
    import pybind11  # without the extension it is not needed

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
        # Not self.build_temp, which an editable install throws away: the next would compile everything anew.
        build = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # The cache names the ninja of the last build, which went with pip's build environment, and keeps options that nobody asks for now.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={lasting_pybind11(build)}",
            f"-DFASTSUPCON_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        )
        run("cmake", "--build", str(build))
        # Python started in the checkout finds its fastsupcon/ before the installed one, so the extension goes there too.
        checkout = ROOT / "fastsupcon" / target.name
        if checkout != target:
            shutil.copyfile(target, checkout.with_suffix(".new"))
            checkout.with_suffix(".new").replace(checkout)


class Modules(build_py):
    """The package as it is now: what an earlier build left in the build folder would be in the wheel, and an extension that it left in the
    checkout would be found there."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / "fastsupcon", ignore_errors=True)
        if not self.distribution.ext_modules:
            (ROOT / "fastsupcon" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        super().run()


if __name__ == "__main__":
    address = project_address()
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
    setup(
        ext_modules=[] if without_extension() else [Extension("fastsupcon._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": Modules},
        long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), address, f"v{version}"),
        long_description_content_type="text/markdown",
        project_urls={
            "Source": address,
            "Issues": f"{address}/issues",
            "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
        }
        if address
        else {},
    )
