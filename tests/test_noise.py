"""Flows with noise: laws that are known, orders of convergence, and what is refused."""

import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import iv

import jaxflow as jf
from jaxflow.observables import fourier_modes, order_parameter

KEY = jax.random.key(0)
PULL = jf.LinearDrift(-jnp.eye(2))  # dX = -X dt: Ornstein and Uhlenbeck's
KURAMOTO = jf.SelfAttention(beta=0.0)
NOWHERE = jf.LinearDrift(0.0, geometry=jf.Sphere())


def moved(field, points, t1, dt0, kappa=1.0, key=KEY, **options):
    common = options.pop("common", False)
    noise = jf.Noise(kappa, key=key, common=common, tolerance=options.pop("tolerance", None))
    return jf.flow(field, jf.Measure(points), t1=t1, dt0=dt0, noise=noise, **options)


def pole(n, d):
    return jnp.broadcast_to(jnp.eye(d)[-1], (n, d))


# ------------------------------------------------------------------ laws


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("d", [2, 3])
def test_brownian_motion_of_the_sphere(d):
    """Spherical harmonics of degree l decay at l (l + d - 2) / kappa."""
    n, t, kappa = 20_000, 0.4, 0.8
    x = moved(NOWHERE, pole(n, d), t, 0.02, kappa).last.points
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=1), 1, atol=3e-7)
    z = x[:, -1]
    second = (d * z**2 - 1) / (d - 1)
    for found, degree in ((z, 1), (second, 2)):
        expected = np.exp(-degree * (degree + d - 2) * t / kappa)
        # Five standard errors of the mean, and 2 % for steps of that length.
        assert abs(found.mean() - expected) < 5 * found.std() / n**0.5 + 0.02 * expected


@pytest.mark.usefixtures("optimised")
def test_ornstein_uhlenbeck():
    """Mean x e^{-t} and variance (1 - e^{-2t}) / kappa."""
    n, t, kappa = 40_000, 0.7, 2.0
    x = moved(PULL, jnp.broadcast_to(jnp.array([1.0, -2.0]), (n, 2)), t, 0.05, kappa).last.points
    variance = (1 - np.exp(-2 * t)) / kappa
    np.testing.assert_allclose(
        x.mean(0), np.exp(-t) * np.array([1.0, -2.0]), atol=5 * (variance / n) ** 0.5
    )
    np.testing.assert_allclose(x.var(0), variance, rtol=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_noisy_kuramoto_settles_on_the_self_consistent_law(kappa):
    """exp(kappa r cos) with r = I_1(kappa r) / I_0(kappa r): 0 up to kappa = 2."""
    gap = lambda r: iv(1, kappa * r) / iv(0, kappa * r) - r
    expected = float(np.asarray(brentq(gap, 0.1, 1))) if kappa > 2 else 0.0
    mu0 = jf.measure.von_mises_fisher(2000, jnp.array([1.0, 0.0]), 1.0, key=KEY)
    r = order_parameter(moved(KURAMOTO, mu0.points, 8.0, 0.1, kappa).last)
    # Fluctuations of n^{-1/2} = 0.022, larger near the transition.
    assert abs(r - expected) < 0.06


def test_the_uniform_law_becomes_unstable_at_the_critical_temperature():
    """Mode 1 of unnormalised attention grows at I_1(beta) / beta - 1 / kappa: kappa_c = 1.769413
    at beta = 1."""
    field = jf.Compressed(jf.SelfAttention(beta=1.0, interaction=jf.Unnormalised()), 1e-5)
    size, t = 0.05, 1.0
    angles = jnp.linspace(0, 2 * jnp.pi, 40_000, endpoint=False)
    points = jf.measure.from_angles(angles - 2 * size * jnp.sin(angles)).points
    for kappa in (1.2, 1.769413, 4.0):
        mode = jnp.abs(fourier_modes(moved(field, points, t, 0.05, kappa).last, 1))
        rate = iv(1, 1.0) - 1 / kappa
        # The mode is a mean over n tokens, of size 0.05.
        np.testing.assert_allclose(np.log(mode / size) / t, rate, atol=5 / 40_000**0.5 / size)


def test_common_noise_moves_all_tokens_alike():
    points = jax.random.normal(KEY, (2, 5, 3))
    gone = moved(jf.LinearDrift(0.0), points, 1.0, 0.5, common=True).last.points - points
    np.testing.assert_allclose(gone, jnp.broadcast_to(gone[:, :1], gone.shape), atol=2e-6)
    assert jnp.abs(gone[0] - gone[1]).max() > 0.1  # each system its own


# ------------------------------------------------------------------ orders


def ends(field, points, solver, steps, **options):
    """One path with steps of different length."""
    return [
        moved(field, points, 1.0, 1 / n, solver=solver, tolerance=2.0**-12, **options).last.points
        for n in steps
    ]


def slope(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "solver, order",
    [(diffrax.Euler(), 1.0), (diffrax.Heun(), 1.0), (diffrax.ShARK(), 1.5)],
    ids=str,
)
def test_strong_order_on_flat_space(solver, order):
    field = jf.SelfAttention(beta=1.0, geometry=jf.Euclidean()) + jf.LinearDrift(-3 * jnp.eye(2))
    points = jax.random.normal(KEY, (64, 2))
    *rest, fine = ends(field, points, solver, (8, 16, 32, 512))
    errors = [jnp.sqrt(((x - fine) ** 2).mean()) for x in rest]
    assert slope((8, 16, 32), errors) > order - 0.2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Euler()], ids=str)
def test_methods_on_the_sphere_follow_one_path(solver):
    """To the strong order 1/2, as without areas of the path none has more."""
    points = jf.measure.uniform_sphere(200, 3, key=KEY).points
    field = jf.SelfAttention(beta=2.0)
    [exact] = ends(field, points, diffrax.Heun(), (1024,), kappa=4.0)
    steps = 8, 32, 128
    errors = [
        jnp.sqrt(((x - exact) ** 2).mean()) for x in ends(field, points, solver, steps, kappa=4.0)
    ]
    assert slope(steps, errors) > 0.4 and errors[-1] < 0.08


@pytest.mark.usefixtures("optimised")
def test_weak_orders_on_the_sphere():
    """Harmonics of degree 1 and 2, the mean and the second moment, whose laws are known: the error
    is that of the step."""
    n, t, kappa, steps = 400_000, 1.0, 2.0, (2, 4, 8)
    heights = [moved(NOWHERE, pole(n, 3), t, t / m, kappa).last.points[:, 2] for m in steps]
    for harmonic, rate in ((lambda z: z, 2), (lambda z: (3 * z**2 - 1) / 2, 6)):
        errors = [abs(harmonic(z).mean() - np.exp(-rate * t / kappa)) for z in heights]
        assert 0.7 < slope(steps, errors) < 1.7, errors  # standard errors are a hundredth of these


# ------------------------------------------------------------------ as without noise


def test_observables_events_keys_and_temperatures():
    points = jf.measure.uniform_sphere(64, 3, key=KEY).points

    @jax.jit
    @jax.vmap
    def final(key, kappa):
        noise = jf.Noise(kappa, key=key)
        sol = jf.flow(KURAMOTO, jf.Measure(points), t1=1.0, dt0=0.25, noise=noise, throw=False)
        return sol.last.points

    found = final(jax.random.split(KEY, 3), jnp.array([1.0, 1.0, 1e12]))
    assert jnp.abs(found[0] - found[1]).max() > 0.1
    plain = jf.flow(KURAMOTO, jf.Measure(points), t1=1.0).last.points
    np.testing.assert_allclose(found[2], plain, atol=2e-2)  # Heun's four steps, hardly any noise
    sol = moved(
        KURAMOTO, points, 50.0, 0.1, 100.0,
        event=jf.events.until_above(lambda t, mu: order_parameter(mu), 0.8),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0, 50, 11), t1=True),
        observe={"order": lambda t, mu: order_parameter(mu)},
    )  # fmt: skip
    assert (
        sol.end < 50 and order_parameter(sol.final) >= 0.8 and sol.observed["order"].shape == (12,)
    )


def test_the_gradient_by_the_temperature():
    """Of E|X|^2 = d (1 - e^{-2t}) / kappa, path by path."""
    start = jnp.zeros((100, 2))
    energy = lambda kappa: (moved(PULL, start, 0.5, 0.1, kappa).last.points ** 2).sum()
    value, slope = jax.value_and_grad(energy)(2.0)
    np.testing.assert_allclose(slope, -value / 2.0, rtol=1e-4)


def test_16_bits_move_in_32():
    points = jf.measure.uniform_sphere(8, 3, key=KEY).points.astype(jnp.bfloat16)
    assert moved(KURAMOTO, points, 0.5, 0.1).last.points.dtype == jnp.float32


def test_no_method_is_said_to_be_unknown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved(KURAMOTO, pole(4, 3), 0.2, 0.1)
