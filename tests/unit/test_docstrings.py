"""Every example in a docstring of the package runs as written, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import pyro_sivism


def _examples():
    """One case for each docstring with an example; a name that another module re-exports counts once."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(pyro_sivism.__path__, "pyro_sivism."):
        module = importlib.import_module(info.name)
        for case in finder.find(module, module.__name__, extraglobs={"torch": torch}):
            if case.examples:
                yield pytest.param(case, id=case.name)


EXAMPLES = list(_examples())


@pytest.mark.parametrize("case", EXAMPLES)
def test_example(case, capsys):
    failed, attempted = doctest.DocTestRunner(verbose=False).run(case, clear_globs=False)
    assert failed == 0, capsys.readouterr().out
    assert attempted == len(case.examples)


def test_the_examples_are_found():
    named = {case.values[0].name.rpartition(".")[2] for case in EXAMPLES}
    assert {"LatentLayout", "Replay", "SIVISM", "SemiImplicit", "SemiImplicitGuide", "Target"} <= named


@pytest.mark.parametrize("name", pyro_sivism.__all__)
def test_every_public_name_has_a_docstring(name):
    thing = getattr(pyro_sivism, name)
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__  # not that of a base class
    assert name == "__version__" or (own or "").strip()
