"""timm, for every test that needs it."""

import importlib.util
import sys
import types

import pytest

STUBS = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models")


class AnyClass(type):
    """A class that has every attribute, a class of this kind again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyClass(name, (), {})


class Stub(types.ModuleType):
    __path__ = ()
    __getattr__ = AnyClass.__getattr__


@pytest.fixture(scope="module")
def timm():
    """timm; where torchvision is missing, modules of that name stand in while timm imports it."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    names = [] if importlib.util.find_spec("torchvision") else [f"torchvision{part}" for part in STUBS]
    for name in names:
        sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]
