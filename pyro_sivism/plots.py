"""Pictures of what this package finds, by matplotlib, which ``pip install pyro-sivism[plots]`` brings along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_sivism.compare import Comparison
from pyro_sivism.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

# Two hues that differ in lightness too, so that they are told apart in grey and by most eyes.
_NUTS_COLOR, _FIT_COLOR = "#7fa8cf", "#c1440e"
_MAX_POINTS = 1000
_SHOWN = (0.002, 0.998)  # quantiles of NUTS's draws between which an axis runs
_MARGIN = 0.15
_NUM_TICKS = 4


def plot_comparison(comparison: Comparison, elements: Sequence[str] | None = None, *, most: int = 4) -> Figure:
    """The fit's draws over NUTS's: marginals on the diagonal, pairs below it.

    Args:
        comparison: what :func:`~pyro_sivism.compare_with_nuts` returned.
        elements: names of the elements to show, such as ``["tau", "theta[3]"]``; if None the worst one of each site.
        most: how many at most, if ``elements`` is None.

    Returns:
        a ``matplotlib.figure.Figure``; ``figure.savefig("comparison.png")`` writes it. pyplot is left alone, so that
        nothing has to be closed.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ArgumentError: an element is not among those that were compared.

    Example:

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_sivism import SIVISM, compare_with_nuts
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> pyro.set_rng_seed(0)
        >>> sivism = SIVISM(model)
        >>> fit = sivism.run(10, progress_bar=False)
        >>> figure = plot_comparison(compare_with_nuts(sivism, nuts={"x": torch.randn(500)}))
        >>> len(figure.axes)
        1
    """
    figure_class = _figure_class()
    names = [row.element for row in comparison.worst[:most]] if elements is None else list(elements)
    unknown = [name for name in names if name not in comparison.draws]
    if unknown or not names:
        known = list(comparison.draws)
        some = known if len(known) <= 10 else [*known[:10], "..."]
        raise ArgumentError(f"got the elements {unknown or names}; expected at least one of {some}")
    count = len(names)
    size = 2.2 * count + 1.0
    figure = figure_class(figsize=(max(size, 4.5), max(size, 3.5)), layout="constrained")
    grid = figure.subplots(count, count, squeeze=False)
    limits = {name: _limits(comparison.reference[name], comparison.draws[name]) for name in names}
    for row, y in enumerate(names):
        for column, x in enumerate(names):
            axes = grid[row, column]
            if column > row:
                axes.remove()
                continue
            axes.set_xlim(limits[x])
            if row == column:
                _marginal(axes, comparison, x, limits[x])
            else:
                _pair(axes, comparison, x, y)
                axes.set_ylim(limits[y])
            _label(axes, x if row == count - 1 else None, y if column == 0 and row > 0 else None, row == column)
    figure.align_ylabels(list(grid[1:, 0]))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False)
    return figure


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots are drawn by matplotlib, which is not installed. Cure: pip install pyro-sivism[plots]"
        ) from None
    return Figure


def _limits(reference: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """A range that shows the bulk of both."""
    low, high = np.quantile(reference, _SHOWN)
    low, high = min(low, np.quantile(draws, 0.01)), max(high, np.quantile(draws, 0.99))
    margin = _MARGIN * (high - low)
    return float(low - margin), float(high + margin)


def _marginal(axes: Any, comparison: Comparison, name: str, limits: tuple[float, float]) -> None:
    num_bins = int(2.0 * len(comparison.reference[name]) ** (1.0 / 3.0))
    edges = np.linspace(*limits, num_bins + 1)
    width = edges[1] - edges[0]
    for draws, style in (
        (comparison.reference[name], {"histtype": "stepfilled", "color": _NUTS_COLOR, "alpha": 0.6, "label": "NUTS"}),
        (comparison.draws[name], {"histtype": "step", "color": _FIT_COLOR, "linewidth": 1.5, "label": "SIVISM"}),
    ):
        axes.hist(draws, edges, weights=np.full(len(draws), 1.0 / (len(draws) * width)), **style)
    axes.set_yticks([])
    axes.set_ylim(bottom=0.0)


def _pair(axes: Any, comparison: Comparison, x: str, y: str) -> None:
    for draws, color, size in ((comparison.reference, _NUTS_COLOR, 4.0), (comparison.draws, _FIT_COLOR, 2.0)):
        every = max(1, len(draws[x]) // _MAX_POINTS)
        points = draws[x][::every], draws[y][::every]
        axes.plot(*points, ".", color=color, markersize=size, markeredgewidth=0.0, alpha=0.7, rasterized=True)


def _label(axes: Any, x: str | None, y: str | None, is_marginal: bool) -> None:
    for side in ("top", "right", *(["left"] if is_marginal else [])):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize="small")
    axes.xaxis.get_major_locator().set_params(nbins=_NUM_TICKS)
    if x is None:
        axes.tick_params(labelbottom=False)
    else:
        axes.set_xlabel(x)
    if y is None:
        axes.tick_params(labelleft=False)
    else:
        axes.set_ylabel(y)
