"""A flow as an xarray.Dataset; solutions are made without a solve."""

import sys
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow._solution import FlowSolution, Sides, measures_at

TS = jnp.array([0.0, 0.5, 2.0, jnp.inf])  # the last time was not reached
POINTS = jnp.arange(24.0).reshape(4, 3, 2)


def solution(ts=TS, points: Any = POINTS, log_weights=None, **observed) -> FlowSolution:
    return FlowSolution(
        ts, measures_at(points, log_weights), observed, None, ts[0], ts[-1],
        jf.Measure(POINTS[0]), {}, diffrax.RESULTS.successful, None, None,
        jf.Euclidean(), log_weights,
    )  # fmt: skip


@pytest.fixture
def xarray():
    return pytest.importorskip("xarray")


def test_axes_have_names(xarray):
    log_weights = jnp.log(jnp.array([1.0, 1.0, 2.0]))
    energy, spectrum = jnp.arange(4.0), jnp.ones((4, 5))
    sides = Sides(energy, energy + 1)
    data = solution(
        log_weights=log_weights, energy=energy, spectrum=spectrum, jump=sides
    ).to_xarray()
    assert isinstance(data, xarray.Dataset) and data.attrs == {"geometry": "Euclidean"}
    assert dict(data.sizes) == {"time": 3, "token": 3, "component": 2, "spectrum_0": 5}
    np.testing.assert_array_equal(data.time, TS[:3])
    np.testing.assert_array_equal(data.points.sel(time=0.5).isel(token=1), POINTS[1, 1])
    np.testing.assert_allclose(data.weight, [0.25, 0.25, 0.5], rtol=1e-6)
    assert data.energy.dims == ("time",) and data["jump.after"][0] == 1
    mean = data.points.weighted(data.weight).mean("token")
    np.testing.assert_allclose(mean[0], [2.5, 3.5])


def test_systems_have_an_axis(xarray):
    batch = POINTS.reshape(4, 1, 3, 2) + jnp.zeros((1, 2, 1, 1))
    data = solution(points=batch, order=jnp.zeros((4, 2)), all=jnp.zeros((4, 3))).to_xarray()
    assert data.points.dims == ("time", "system", "token", "component")
    assert data.weight.dims == ("system", "token") and data.order.dims == ("time", "system")
    assert data["all"].dims == ("time", "all_0")
    twice = solution(points=batch[:, None]).to_xarray()
    assert twice.points.dims[1:3] == ("system_0", "system_1")


@pytest.mark.parametrize(
    "sol, message",
    [
        (solution(points=None), "needs saved points"),
        (solution(ts=jnp.zeros((2, 4))), r"tree\.map\(lambda a: a\[0\], sol\)"),
        (solution(time=jnp.zeros(4)), "observe 'time' by another name"),
    ],
)
def test_what_is_no_dataset(sol, message):
    with pytest.raises(ValueError, match=message):
        sol.to_xarray()


def test_missing_xarray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r'xarray: pip install "jaxflow\[xarray\]"'):
        solution().to_xarray()
