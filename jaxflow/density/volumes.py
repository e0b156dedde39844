"""Finite volumes: cells whose mass moves through their faces, so that none is lost.

    rho_i' = -(F_{i+1/2} - F_{i-1/2}) / h
    F_{i+1/2} = v+ (rho_i + s_i / 2) + v- (rho_{i+1} - s_{i+1} / 2),    v = X[rho](x_{i+1/2})

with slopes s_i limited to what keeps the density between its neighbours (van Leer's monotonised
central ones: Towards the ultimate conservative difference scheme IV, 1977): second order where rho
is smooth, and not negative for steps up to h / (2 max |v|) of a method that preserves it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._rules import count, real
from ..geometry import Euclidean
from .grids import AbstractCircle, AbstractGrid, on_circle
from .steps import SSPRK43


class Circle(AbstractCircle):
    """The unit circle in n cells of equal length, around the angles 2 pi i / n.

    **Arguments:** `n`, at least 4.

    **Raises:** `ValueError` or `TypeError` where it is no such number.
    """

    n: int = eqx.field(static=True)

    def __init__(self, n: int):
        self.n = count("n", n, 4)

    @property
    def solver(self):
        return SSPRK43()

    def encode(self, density):
        return density

    def decode(self, state):
        return state

    def transport(self, field, t, state):
        faces = self.axes[0] + self._length / 2
        velocity = field(t, on_circle(faces), self.measure(state))
        along = (velocity * on_circle(faces + np.pi / 2)).sum(axis=1)
        return upwind(state, along, self._length)

    @property
    def eigenvalues(self):
        half = np.pi * np.arange(self.n // 2 + 1) / self.n
        return jnp.asarray((2 * np.sin(half) / self._length) ** 2, float)

    def transform(self, state):
        return jnp.fft.rfft(state)

    def inverse(self, modes):
        return jnp.fft.irfft(modes, self.n)

    @property
    def _length(self):
        return 2 * np.pi / self.n


class Box(AbstractGrid):
    """An interval, a rectangle or a box of R^d in cells of equal size, with walls around it.

    Nothing passes a wall: take a box that holds the density at all times.

    **Arguments:** `low`, `high`, the corners, a number or one a coordinate; `cells`, how many
    along each coordinate, at least 4: `Box(-3.0, 3.0, 128)` is an interval of R,
    `Box((-3.0, -3.0), (3.0, 3.0), (64, 64))` a square in the plane.

    **Raises:** `ValueError` or `TypeError` where these make no box.
    """

    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)
    cells: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, low: Any, high: Any, cells: Any):
        corners = [np.atleast_1d(np.asarray(corner)).tolist() for corner in (low, high)]
        self.low, self.high = (
            tuple(float(real("a corner of a box", x)) for x in corner) for corner in corners
        )
        many = cells if isinstance(cells, tuple | list) else [cells]
        self.cells = tuple(count("cells", n, 4) for n in many)

    def __check_init__(self):
        ordered = all(a < b for a, b in zip(self.low, self.high, strict=False))
        if not len(self.low) == len(self.high) == len(self.cells) or not ordered:
            raise ValueError(
                "a box takes low < high and cells, one number a coordinate; got "
                f"low={self.low}, high={self.high}, cells={self.cells}."
            )

    @property
    def geometry(self):
        return Euclidean()

    @property
    def shape(self):
        return self.cells

    @property
    def axes(self):
        sides = zip(self.low, self._lengths, self.cells, strict=True)
        return tuple(a + h * (np.arange(n) + 0.5) for a, h, n in sides)

    @property
    def points(self):
        return _product(self.axes)

    @property
    def volumes(self):
        return jnp.full(int(np.prod(self.cells)), float(np.prod(self._lengths)), float)

    @property
    def solver(self):
        return SSPRK43()

    def encode(self, density):
        return density.reshape(self.cells)

    def decode(self, state):
        return state.ravel()

    def transport(self, field, t, state):
        faces = [self._faces(k) for k in range(len(self.cells))]
        velocity = field(t, jnp.concatenate(faces), self.measure(state.ravel()))
        rate, start = jnp.zeros_like(state), 0
        for k, h in enumerate(self._lengths):
            inside = tuple(n - (j == k) for j, n in enumerate(self.cells))
            along = velocity[start : start + len(faces[k]), k].reshape(inside)
            start += len(faces[k])
            walled = [(0, j == k) for j in range(len(inside))]
            rate = rate + upwind(state, jnp.pad(along, walled), h, axis=k, walls=True)
        return rate

    @property
    def eigenvalues(self):
        squares = [
            (2 * np.sin(np.pi * np.arange(n) / (2 * n)) / h) ** 2
            for h, n in zip(self._lengths, self.cells, strict=True)
        ]
        return jnp.asarray(sum(np.ix_(*squares), np.zeros(())), float)

    def transform(self, state):
        return jax.scipy.fft.dctn(state, type=2, norm="ortho")

    def inverse(self, modes):
        return jax.scipy.fft.idctn(modes, type=2, norm="ortho")

    @property
    def _lengths(self):
        sides = zip(self.low, self.high, self.cells, strict=True)
        return tuple((b - a) / n for a, b, n in sides)

    def _faces(self, k: int) -> Float[Array, "faces d"]:
        """The centres of the faces between cells along coordinate k."""
        axes = list(self.axes)
        axes[k] = axes[k][:-1] + self._lengths[k] / 2
        return _product(axes)


def upwind(
    rho: Float[Array, "*cells"],
    velocity: Float[Array, "*cells"],
    h: float,
    *,
    axis: int = 0,
    walls: bool = False,
) -> Float[Array, "*cells"]:
    """-d(rho v)/dx of cells of length h, v at the face after each cell along the axis.

    The cells are periodic; `walls` are a velocity and a slope of 0 at the last face.
    """
    after = lambda a: jnp.roll(a, -1, axis)
    before = lambda a: jnp.roll(a, 1, axis)
    steps = after(rho) - rho
    if walls:
        last = jnp.arange(rho.shape[axis]) == rho.shape[axis] - 1
        steps = jnp.where(
            jnp.expand_dims(last, [k for k in range(rho.ndim) if k != axis]), 0, steps
        )
    half = _limited(before(steps), steps) / 2
    flux = jnp.where(velocity > 0, rho + half, after(rho - half)) * velocity
    return (before(flux) - flux) / h


def _limited(a: Array, b: Array) -> Array:
    """The slope nearest to 0 of 2 a, 2 b and their mean, 0 where they differ in sign."""
    size = jnp.minimum(2 * jnp.minimum(jnp.abs(a), jnp.abs(b)), jnp.abs(a + b) / 2)
    return jnp.where(a * b > 0, jnp.sign(a) * size, 0)


def _product(axes) -> Float[Array, "n d"]:
    """The points of a product of axes, the last one fastest."""
    return jnp.asarray(np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], 1), float)
