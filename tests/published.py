"""The code of other libraries, to be compared with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest import mock

import pytest


def alone(name: str, *empty: str) -> ModuleType:
    """Module ``name`` of an installed package, imported without the ``__init__`` of its packages and with nothing in the modules ``empty``.

    What a package imports first may not be importable here (torchvision from PyPI beside a CPU build of torch), where the file that is
    asked for needs torch alone. Skips the test if the package is not installed.
    """
    package, *parts = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    with mock.patch.dict(sys.modules):
        for loaded in list(sys.modules):
            if loaded.split(".")[0] == package:
                del sys.modules[loaded]
        for depth in range(len(parts)):
            parent = ModuleType(".".join((package, *parts[:depth])))
            parent.__path__ = ["/".join((folder, *parts[:depth])) for folder in spec.submodule_search_locations]
            sys.modules[parent.__name__] = parent
        sys.modules.update({other: ModuleType(other) for other in empty})
        return importlib.import_module(name)
