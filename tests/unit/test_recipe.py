"""The defaults by dimension: what grows with D, and what does not."""

from __future__ import annotations

import pytest
from torch import nn

from pyro_sivism.family import DiagonalNormal, ScoreNetwork
from pyro_sivism.recipe import Recipe


def num_weights(dim: int) -> int:
    """Of both networks by default."""
    recipe = Recipe.for_dim(dim)
    family = DiagonalNormal(
        dim,
        recipe.mixing_dim,
        recipe.guide_hidden_dims,
        scale_depends_on_z=recipe.scale_depends_on_z,
        gated=recipe.gated,
    )
    modules: list[nn.Module] = [family, ScoreNetwork(dim, recipe.critic_hidden_dims, gated=recipe.gated)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_networks_grow_with_d_and_not_with_its_square():
    assert num_weights(8000) < 2.05 * num_weights(4000)


@pytest.mark.parametrize("dim", [1, 22, 144, 256])
def test_every_coordinate_has_a_mixing_variable_up_to_256(dim):
    assert Recipe.for_dim(dim).mixing_dim == dim
