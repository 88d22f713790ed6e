"""Hygiene for every test: a clean param store, a fixed seed, and no leaked global state."""

from __future__ import annotations

import warnings

import pyro
import pytest
import torch

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
