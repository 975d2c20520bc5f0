"""A grid on [0, 1] that integrates smooth functions to 10 digits or more, also those that rise steeply at an end."""

from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Panels shrink by halves towards both ends down to 2^-36, so a density proportional to e^(u/beta) is resolved for beta
# down to about 1e-9; elsewhere none is wider than 1/32, for a policy may also jump in the middle.
_SMALLEST_PANEL = 2.0**-36
_WIDEST_PANEL = 1 / 32
_NODES_PER_PANEL = 10


@dataclass(frozen=True, slots=True, eq=False)
class UnitGrid:
    """Gauss-Legendre nodes on panels of [0, 1], symmetric around ½; the ends themselves are no nodes.

    Attributes:
        nodes: [nodes], increasing.
        weights: [nodes], sum 1.
        widths: [panels], of the panels.
        running: [nodes per panel, nodes per panel]; integrals from a panel's left end to each of its nodes for a panel
            of width 1, exact for polynomials of degree < nodes per panel.
    """

    nodes: FloatArray
    weights: FloatArray
    widths: FloatArray
    running: FloatArray

    @classmethod
    def build(cls) -> Self:
        """The grid with the panels named above."""
        edges = _edges()
        roots, weights = legendre.leggauss(_NODES_PER_PANEL)
        at, share = (roots + 1) / 2, weights / 2
        widths = np.diff(edges)
        nodes = edges[:-1, None] + widths[:, None] * at
        return cls(nodes=nodes.ravel(), weights=(widths[:, None] * share).ravel(), widths=widths, running=_running(at))

    def integral(self, values: FloatArray) -> float:
        """∫ over [0, 1] of a function given at the nodes."""
        return float(self.weights @ values)

    def running_integral(self, values: FloatArray) -> FloatArray:
        """∫_0^u at every node u of a function given at the nodes; [nodes]."""
        panels = values.reshape(len(self.widths), -1)
        totals = (self.weights * values).reshape(panels.shape).sum(axis=1)
        before = np.concatenate(([0.0], np.cumsum(totals)[:-1]))
        return (before[:, None] + self.widths[:, None] * (panels @ self.running.T)).ravel()


@cache
def unit_grid() -> UnitGrid:
    """The one grid that everything here integrates on."""
    return UnitGrid.build()


def _edges() -> FloatArray:
    halves = _SMALLEST_PANEL * 2.0 ** np.arange(31 + 1)
    lower = np.concatenate(([0.0], halves, np.arange(2, 17) * _WIDEST_PANEL))
    return np.concatenate((lower, 1 - lower[-2::-1]))


def _running(at: FloatArray) -> FloatArray:
    # Row i holds ∫_0^at[i] of each Lagrange polynomial, by way of Legendre series on [-1, 1].
    series = np.linalg.inv(legendre.legvander(2 * at - 1, len(at) - 1))
    integrals = legendre.legint(series, lbnd=-1, axis=0) / 2
    return np.asarray(legendre.legval(2 * at - 1, integrals).T, dtype=np.float64)
