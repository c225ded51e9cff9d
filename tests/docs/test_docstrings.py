import importlib
import inspect
import pkgutil

import pytest

import analysis
import pagating
import tune

MODULES = sorted(
    found.name
    for package in (pagating, tune, analysis)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not found.ispkg
)


def silent(module):
    """Return the public functions, classes and methods without a docstring; a method may inherit its docstring."""
    found = []
    for name, thing in vars(module).items():
        ours = getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
        if not ours or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if not thing.__doc__:
            found.append(name)
        for method, body in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(body) and not method.startswith("_") and not inspect.getdoc(getattr(thing, method)):
                found.append(f"{name}.{method}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_says_what_it_does(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    assert silent(module) == []


def test_a_missing_docstring_is_found():
    module = type(importlib)("made_up")
    exec("def mute(): pass\nclass Mute:\n    def say(self): pass\ndef _private(): pass", vars(module))
    assert silent(module) == ["mute", "Mute", "Mute.say"]
