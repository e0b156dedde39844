"""Densities on grids against laws that are known, and against tokens.

Steps are controlled to 1e-8, the default of float64: what a spectral grid resolves is exact to
some 1e-7 after tens of steps.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq
from scipy.special import iv
from scipy.stats import wasserstein_distance

import jaxflow as jf
from jaxflow import density
from jaxflow.density import closures
from jaxflow.geometry import AbstractGeometry

pytestmark = pytest.mark.usefixtures("x64")

ROUNDING = 1e-13


class Hashed(list):
    """A list that is itself alone."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


def solve(field, rho0, grid, **options):
    return density.solve(field, rho0, grid, **{"adjoint": diffrax.ForwardMode(), **options})


def l1(sol, exact):
    return float(jnp.abs(sol.densities[-1] - exact) @ sol.grid.volumes)


def is_density(sol, rounding=ROUNDING):
    assert np.abs(sol.mass - 1).max() < rounding
    assert sol.densities.min() > -rounding


def poisson(r):
    law = closures.OttAntonsen()
    return jax.vmap(lambda x: jnp.exp(law.log_density(jnp.array([r, 0.0]), x)))


def order_parameter(t, r0=0.3):
    """F5."""
    return r0 * np.exp(t / 2) / np.sqrt(1 - r0**2 + r0**2 * np.exp(t))


# ------------------------------------------------------------------ the circle


def test_finite_volumes_on_the_circle_are_of_second_order():
    """Kuramoto from r = 0.3 to 0.46, in L^1."""
    field, errors = jf.SelfAttention(beta=0.0), []
    for n in (48, 96):
        grid = density.Circle(n)
        sol = solve(field, poisson(0.3)(grid.points), grid, t1=1.0)
        is_density(sol)
        errors.append(l1(sol, poisson(order_parameter(1.0))(grid.points)))
    orders = -np.diff(np.log2(errors))
    assert (orders > 1.9).all() and errors[-1] < 3e-4, (orders, errors)


def test_fourier_series_are_exact_where_they_resolve():
    """The modes r^k of a Poisson kernel beyond k = 32 hold 0.46^32 = 2e-11. Energy, by F7's sum:
    E = (1 / 2b) int int e^{b <x, y>} = (1 / 2b) sum_k I_k(b) r^{2|k|}."""
    grid, field = density.FourierCircle(96), jf.SelfAttention(beta=0.0)
    saveat = diffrax.SaveAt(ts=jnp.array([0.0, 0.5, 1.0]))
    sol = solve(field, poisson(0.3)(grid.points), grid, t1=1.0, saveat=saveat)
    is_density(sol)
    r = order_parameter(np.asarray(sol.ts))
    assert l1(sol, poisson(r[-1])(grid.points)) < 1e-7
    np.testing.assert_allclose(sol.mean[:, 0], r, rtol=0, atol=1e-8)
    k = np.arange(-40, 41)
    energies = (iv(k, 2.0) * r[:, None] ** (2 * abs(k))).sum(axis=1) / 4
    np.testing.assert_allclose(sol.energy(2.0), energies, rtol=1e-7)
    np.testing.assert_allclose(sol.measures.mean, sol.mean, atol=1e-12)
    # int rho log rho = -log(2 pi (1 - r^2)^{-1}) + ... of a Poisson kernel: log((1 - r^2) / 2 pi)
    # minus E log |1 - r e^{ia}|^2 = 2 log(1 - r^2).
    entropy = -np.log((1 - r**2) / (2 * np.pi)) + 2 * np.log(1 - r**2)
    np.testing.assert_allclose(sol.entropy, entropy, rtol=0, atol=1e-7)


def test_linear_attention_on_the_circle():
    """Poisson kernels in the doubled angle (Ott and Antonsen)."""
    law = closures.OttAntonsen(0.75, harmonic=2)
    of = lambda z: jax.vmap(lambda x: jnp.exp(law.log_density(z, x)))
    grid, field = density.FourierCircle(96), jf.SelfAttention(beta=1.5, interaction=jf.Linear())
    z0 = jnp.array([0.1, 0.2])
    sol = solve(field, of(z0)(grid.points), grid, t1=0.5)
    z = closures.evolve(law, z0, t1=0.5).states[-1]
    assert l1(sol, of(z)(grid.points)) < 1e-7


@pytest.mark.parametrize("interaction", [jf.Softmax(), jf.Unnormalised()])
def test_growth_off_the_uniform_law(interaction):
    """F6: mode k grows at k^2 I_k(b) / b under USA, divided by I_0(b) under SA; here of size 1e-4,
    whose square is what the linear rate leaves out."""
    b, k, t = 5.0, 3, 0.05
    grid, size = density.FourierCircle(48), 1e-4
    field = jf.SelfAttention(beta=b, interaction=interaction)
    sol = solve(field, 1 + size * jnp.cos(k * jnp.asarray(grid.axes[0])), grid, t1=t)
    found = 2 * sol.densities[-1] @ jnp.cos(k * jnp.asarray(grid.axes[0])) * grid.volumes[0]
    rate = k**2 * iv(k, b) / b / (iv(0, b) if isinstance(interaction, jf.Softmax) else 1)
    np.testing.assert_allclose(np.log(found / size) / t, rate, rtol=1e-4)


@pytest.mark.parametrize("grid", [density.Circle(96), density.FourierCircle(48)])
def test_the_stationary_law_on_the_circle(grid):
    """F18 at b = 0, kappa = 4: von Mises with r = I_1(kappa r) / I_0(kappa r) = .831462."""
    r = root(lambda r: iv(1, 4 * r) / iv(0, 4 * r) - r)
    np.testing.assert_allclose(r, 0.831462, rtol=0, atol=5e-7)
    exact = np.exp(4 * r * np.cos(grid.axes[0])) / (2 * np.pi * iv(0, 4 * r))
    sol = solve(jf.SelfAttention(beta=0.0), lambda x: 1 + 0.9 * x[0], grid, t1=30.0, kappa=4.0)
    is_density(sol, 1e-11)
    # Second order, (2 pi / 96)^2 / 4 = 1e-3; spectral up to the steps near the steady state.
    second = isinstance(grid, density.Circle)
    np.testing.assert_allclose(sol.mean[-1, 0], r, rtol=0, atol=1e-3 if second else 2e-7)
    assert l1(sol, exact) < (3e-3 if second else 1e-6)


# ------------------------------------------------------------------ the line and the plane


def normal(grid, mean, variance):
    x = grid.points[:, 0]
    return jnp.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def root(fn) -> float:
    found: Any = brentq(fn, 0.1, 0.99)
    return found


def gaussian(mean, variance):
    return lambda x: jnp.exp(-((x - jnp.asarray(mean)) ** 2).sum() / (2 * variance))


def test_softmax_on_the_line_is_of_second_order():
    """F12: with V = -1, N(m, S) has S = (1/S_0 + 2 b t)^{-1}, m' = -(1 + b S) m."""
    field = jf.SelfAttention(value=[[-1.0]], beta=0.5, geometry=jf.Euclidean())
    law = closures.Moments(jnp.array([0.8]), jnp.array([[1.0]]))
    m, S = (a[-1].item() for a in closures.evolve(closures.gaussian(field, 1), law, t1=0.5).states)
    np.testing.assert_allclose(S, 1 / 1.5, rtol=1e-7)
    errors = []
    for n in (60, 120):
        grid = density.Box(-6.0, 6.0, n)
        sol = solve(field, gaussian([0.8], 1.0), grid, t1=0.5)
        is_density(sol)
        errors.append(l1(sol, normal(grid, m, S)))
    orders = -np.diff(np.log2(errors))
    assert (orders > 1.8).all() and errors[-1] < 2e-3, (orders, errors)


def test_the_ornstein_uhlenbeck_law():
    """dx = -x dt + sqrt(2/kappa) dW: N(e^{-t} m, 1/kappa + (S - 1/kappa) e^{-2t}), on a line."""
    grid = density.Box(-5.0, 5.0, 128)
    sol = solve(jf.LinearDrift(-1.0), gaussian([1.0], 1.0), grid, t1=1.0, kappa=2.0)
    is_density(sol, 1e-12)
    variance = 0.5 + 0.5 * np.exp(-2)
    assert l1(sol, normal(grid, np.exp(-1), variance)) < 2e-3
    np.testing.assert_allclose(sol.mean[-1], [np.exp(-1)], atol=1e-3)


@pytest.mark.parametrize("kappa", [None, pytest.param(4.0, marks=pytest.mark.slow)])
def test_the_plane(kappa):
    """Softmax attention with V = -I keeps N(m, S), with S' = -2 b S^2 + 2/kappa: a grid of 32^2 has
    them to second order, (1/4)^2 / 4."""
    field = jf.SelfAttention(value=-np.eye(2), beta=0.5, geometry=jf.Euclidean())
    grid = density.Box((-4.0, -4.0), (4.0, 4.0), (32, 32))
    sol = solve(field, gaussian([0.5, 0.0], 0.8), grid, t1=0.5, kappa=kappa)
    is_density(sol, 1e-12 if kappa is None else 1e-6)
    noise = 0.0 if kappa is None else 2 / kappa
    rate = lambda _, z: [-(1 + 0.5 * z[1]) * z[0], -(z[1] ** 2) + noise]
    m, S = solve_ivp(rate, (0, 0.5), [0.5, 0.8], rtol=1e-9, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(sol.mean[-1], [m, 0], rtol=0, atol=5e-3)
    np.testing.assert_allclose(sol.measures[-1].covariance, S * np.eye(2), rtol=0, atol=0.016)


@pytest.mark.slow
def test_an_anisotropic_box():
    """x_1' = -x_1, x_2' = x_2 / 2 moves the axes apart: a transposed axis would not."""
    grid = density.Box((-3.0, -4.0), (3.0, 4.0), (24, 40))
    drift = jf.LinearDrift(np.diag([-1.0, 0.5]))
    sol = solve(drift, gaussian([0.5, -0.5], 0.3), grid, t1=0.5)
    np.testing.assert_allclose(
        sol.mean[-1], [0.5 * np.exp(-0.5), -0.5 * np.exp(0.25)], rtol=0, atol=5e-3
    )
    assert sol.densities.reshape(-1, *grid.shape).shape == (1, 24, 40)


# ------------------------------------------------------------------ the sphere


def moebius(a, x):
    """The uniform law of S^2 moved by the conformal map with a e_3 as the image of 0."""
    return ((1 - a**2) / (1 - 2 * a * x[..., 2] + a**2)) ** 2 / (4 * np.pi)


def test_attention_at_beta_0_on_the_sphere():
    """X = P_x g, g = E[y], is a conformal field: a' = (1 - a^2) g / 2 (Chandra, Girvan and Ott
    2019), and g(a) by quadrature. a = 0.26 at the end, of which
    degree 16 leaves out 17 a^17 = 2e-9."""
    grid = density.SphereHarmonics(16)
    height = lambda u, a: u * ((1 - a**2) / (1 - 2 * a * u + a**2)) ** 2 / 2
    mean = lambda a: quad(height, -1, 1, args=(a,), epsabs=1e-12)[0]
    rate = lambda _, a: [(1 - a[0] ** 2) * mean(a[0]) / 2]
    a = solve_ivp(rate, (0, 0.5), [0.2], rtol=1e-10, atol=1e-11).y[0, -1]
    sol = solve(jf.SelfAttention(beta=0.0), lambda x: moebius(0.2, x), grid, t1=0.5)
    is_density(sol)
    np.testing.assert_allclose(sol.densities[-1], moebius(a, grid.points), rtol=0, atol=1e-7)
    np.testing.assert_allclose(sol.mean[-1], [0, 0, mean(a)], rtol=0, atol=1e-8)


@pytest.mark.slow
def test_rotated_laws_on_the_sphere():
    """SA commutes with rotations, and harmonics in longitude with those around the axis: what is
    tilted towards e_1 moves as what is tilted towards e_3."""
    grid, field = density.SphereHarmonics(8), jf.SelfAttention(beta=2.0)
    means = [
        solve(field, lambda x, k=k: jnp.exp(0.5 * x[k]), grid, t1=0.5).mean[-1] for k in (0, 1, 2)
    ]
    np.testing.assert_allclose(means, means[2][2] * jnp.eye(3), rtol=0, atol=1e-6)
    assert means[2][2] > 0.2


@pytest.mark.slow
def test_the_stationary_law_on_the_sphere():
    """F18 at b = 0, d = 3, kappa = 6: r = coth(kappa r) - 1 / (kappa r)."""
    r = root(lambda r: 1 / np.tanh(6 * r) - 1 / (6 * r) - r)
    grid = density.SphereHarmonics(14)
    field = jf.SelfAttention(beta=0.0)
    sol = solve(field, lambda x: 1 + 0.5 * x[0], grid, t1=40.0, kappa=6.0)
    is_density(sol, 1e-11)
    np.testing.assert_allclose(sol.mean[-1], [r, 0, 0], rtol=0, atol=1e-6)


def test_the_integrals_of_a_grid():
    """1, x and x x^T are integrated exactly over S^2."""
    grid = density.SphereHarmonics(3)
    w, x = grid.volumes, grid.points
    np.testing.assert_allclose(w.sum(), 4 * np.pi)
    np.testing.assert_allclose(w @ x, 0, atol=1e-13)
    np.testing.assert_allclose(
        jnp.einsum("n,ni,nj->ij", w, x, x), 4 * np.pi / 3 * np.eye(3), atol=1e-13
    )
    values = 1 + x[:, 0] * x[:, 2] - x[:, 1] ** 3
    np.testing.assert_allclose(grid.decode(grid.encode(values)), values, atol=1e-13)


# ------------------------------------------------------------------ tokens


def test_independent_tokens_tend_to_the_density():
    """E W_1 between n moved tokens and the moved law falls like n^{-1/2}; 32 systems of each n."""
    field = jf.SelfAttention(value=[[-1.0]], beta=0.5, geometry=jf.Euclidean())
    grid = density.Box(-6.0, 6.0, 256)
    sol = solve(field, gaussian([0.8], 1.0), grid, t1=0.5)
    x, w = (np.asarray(a) for a in (grid.points[:, 0], sol.densities[-1]))
    sizes, distances = np.array([16, 64, 256]), []
    for n in sizes:
        points = 0.8 + jax.random.normal(jax.random.key(n), (32, n, 1))
        moved = jf.flow(field, jf.Measure(points), t1=0.5, adjoint=diffrax.ForwardMode())
        systems = np.asarray(moved.last.points[..., 0])
        distances.append(np.mean([wasserstein_distance(y, x, None, w) for y in systems]))
    slope = np.polyfit(np.log(sizes), np.log(distances), 1)[0]
    # The mean of 32 has a relative error of about 0.4 / sqrt(32), over log 16 = 2.8.
    assert abs(slope + 0.5) < 0.08, (slope, distances)


def test_the_density_along_the_flow_is_that_on_a_grid():
    """log_density with the density on the grid as mu, beta = 2."""
    field, rho0 = jf.SelfAttention(beta=2.0), lambda x: (1 + 0.5 * x[0]) / (2 * np.pi)
    grid = density.FourierCircle(64)
    sol = solve(field, rho0, grid, t1=0.5)
    mu0 = grid.measure(grid.sample(rho0))
    x, logs = jf.log_density(field, mu0, mu0.points, lambda x: jnp.log(rho0(x)), t1=0.5)
    angles = jnp.arctan2(x[:, 1], x[:, 0])
    modes = jnp.fft.rfft(sol.densities[-1]) / 64
    k = jnp.arange(1.0, 32.0)
    waves = jnp.exp(1j * (k[None] * angles[:, None]).astype(complex))
    there = modes[0].real + 2 * (modes[None, 1:32] * waves).sum(axis=1).real
    np.testing.assert_allclose(jnp.exp(logs), there, rtol=1e-6)


# ------------------------------------------------------------------ time, derivatives, errors


def test_ssprk43_is_of_third_order():
    """Two tokens at beta = 0, rho = tanh t, in 8, 16 and 32 steps."""
    errors = []
    for dt0 in (1 / 8, 1 / 16, 1 / 32):
        sol = closures.evolve(
            closures.TwoTokens(0.0),
            0.0,
            t1=1.0,
            dt0=dt0,
            solver=density.SSPRK43(),
            stepsize_controller=diffrax.ConstantStepSize(),
        )
        errors.append(abs(sol.states[-1] - np.tanh(1)))
    orders = -np.diff(np.log2(np.array(errors)))
    assert (abs(orders - 3) < 0.15).all(), orders


@pytest.mark.slow
def test_other_methods_give_the_same():
    """The Laplacian implicitly in the grid's modes, explicitly, and KenCarp of another order."""
    field, grid = jf.SelfAttention(beta=1.0), density.FourierCircle(24)
    found = [
        solve(field, lambda x: 1 + 0.5 * x[0], grid, t1=1.0, kappa=3.0, solver=solver).mean[-1, 0]
        for solver in (None, diffrax.KenCarp3(), diffrax.Tsit5())
    ]
    np.testing.assert_allclose(found, found[0], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_field_that_moves_in_time():
    """A field of two pieces is one after the other: steps end at the jump."""
    pieces = [jf.SelfAttention(beta=0.0), -2.0 * jf.SelfAttention(beta=0.0)]
    curve = jf.PiecewiseConstant([1.0 * pieces[0], pieces[1]], [0.5])
    grid = density.FourierCircle(48)
    sol = solve(jf.TimeDependent(curve), poisson(0.3)(grid.points), grid, t1=1.0)
    # z' = c (1 - z^2) z / 2, c = 1 and then -2.
    np.testing.assert_allclose(sol.mean[-1, 0], order_parameter(-0.5), rtol=0, atol=1e-7)


class Counted(jf.AbstractField):
    """X = b P_x E[y], which notes when it is traced."""

    b: Array
    traces: list = eqx.field(static=True)
    geometry: AbstractGeometry = jf.Sphere()

    def __call__(self, t, x, mu):
        self.traces.append(1)
        return self.geometry.project(x, jnp.broadcast_to(self.b * mu.mean[None], x.shape))


def test_new_numbers_are_no_new_program():
    grid, traces = density.FourierCircle(16), Hashed()

    def run(b, rho0, t1, rtol, kappa):
        return solve(
            Counted(b=jnp.asarray(b), traces=traces),
            rho0,
            grid,
            t1=t1,
            kappa=kappa,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-8),
        )

    run(1.0, lambda x: 1 + 0.5 * x[0], 0.5, 1e-8, 3.0)
    before = len(traces)
    run(2.0, lambda x: 1 + 0.3 * x[1], 1.0, 1e-7, 4.0)
    assert len(traces) == before


def test_each_step_can_be_saved():
    """Times after the last step are inf, and nothing is asked of them."""
    saveat = diffrax.SaveAt(t0=True, steps=True)
    sol = solve(
        jf.SelfAttention(beta=0.0), poisson(0.3)(density.Circle(32).points), density.Circle(32),
        t1=1.0, saveat=saveat, max_steps=64,
    )  # fmt: skip
    reached = np.isfinite(sol.ts)
    assert sol.ok and 2 < reached.sum() < 65
    assert np.abs(sol.mass[reached] - 1).max() < ROUNDING


@pytest.mark.slow
def test_derivatives():
    """In beta and kappa, by central differences."""

    @jax.jit
    def mean(beta, kappa):
        field, grid = jf.SelfAttention(beta=beta), density.FourierCircle(16)
        rho0 = lambda x: 1 + 0.5 * x[0]
        return density.solve(field, rho0, grid, t1=1.0, kappa=kappa, throw=False).mean[-1, 0]

    slopes, h = jax.grad(mean, argnums=(0, 1))(1.0, 4.0), 1e-3
    beta = (mean(1 + h, 4.0) - mean(1 - h, 4.0)) / (2 * h)
    kappa = (mean(1.0, 4 + h) - mean(1.0, 4 - h)) / (2 * h)
    np.testing.assert_allclose(slopes, [beta, kappa], rtol=1e-5)


def test_a_density_that_is_not_resolved_is_an_error():
    """A cluster of beta = 9 within 24 modes rings; finite volumes stay positive, from a density
    that is 0 on a half of the circle, too."""
    field, rho0 = jf.SelfAttention(beta=9.0), lambda x: 1 + 0.9 * x[0]
    options = {"t1": 3.0, "saveat": diffrax.SaveAt(ts=jnp.linspace(0.0, 3.0, 4))}
    with pytest.raises(jf.FlowError, match="is negative: it does not resolve .* Take a finer grid"):
        solve(field, rho0, density.FourierCircle(24), **options)
    assert not solve(field, rho0, density.FourierCircle(24), throw=False, **options).ok
    half = lambda x: jnp.where(x[0] > 0, 1.0, 0.0)
    is_density(solve(field, half, density.Circle(24), **options))


def test_a_solve_that_fails_says_why():
    field, grid = jf.SelfAttention(beta=0.0), density.Circle(32)
    with pytest.raises(jf.FlowError, match="max_steps = 3 was reached. Raise max_steps"):
        solve(field, lambda x: 1 + x[0], grid, t1=1.0, max_steps=3)
