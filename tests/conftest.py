"""Hygiene for every test: a clean param store, a fixed seed, and no leaked global state."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pyro
import pytest
import torch

from pyro_sivism.recipe import Recipe

torch.set_num_threads(1)


def _global_state() -> dict[str, object]:
    return {
        "torch distributions validation": torch.distributions.Distribution._validate_args,
        "pyro poutine validation": pyro.settings.get("validate_poutine"),
        "pyro infer validation": pyro.settings.get("validate_infer"),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "number of threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _hygiene():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = _global_state()
    yield
    after = _global_state()
    assert after == before, f"the test leaked global state: {before} became {after}"


@pytest.fixture
def float64():
    """Run a test in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def small_recipe(monkeypatch):
    """Tiny networks and hardly a warm-up, for tests of behaviour and not of accuracy."""
    for_dim = Recipe.for_dim

    def small(cls, dim):
        return replace(
            for_dim(dim),
            max_steps=400,
            num_particles=16,
            critic_steps=1,
            critic_warmup_steps=5,
            guide_hidden_dims=(8,),
            critic_hidden_dims=(8,),
        )

    monkeypatch.setattr(Recipe, "for_dim", classmethod(small))
