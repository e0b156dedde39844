"""Linear response against closed forms: modes off the uniform law, clusters, Jacobians."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gamma, iv, ivp

import jaxflow as jf
from jaxflow.stability import wave_rates

pytestmark = pytest.mark.usefixtures("x64")

ROUNDING = 1e-12
MODES = np.arange(1, 33)


def multiplier(k, d, b):
    """int e^{b s} P_k / int e^{b s}, the multiplier of the kernel of softmax for degree k."""
    return iv(k + d / 2 - 1, b) / iv(d / 2 - 1, b)


def softmax_rates(k, d, b):
    return k * (k + d - 2) / b * multiplier(k, d, b)


# ------------------------------------------------------------------ off the uniform law


def test_softmax_on_the_circle_with_noise_and_the_fastest_mode():
    """k^2 I_k(b) / (b I_0(b)) - k^2 / kappa; the fastest is 3 at b = 5 and 4 at b = 7."""
    for b, fastest in ((5.0, 3), (7.0, 4)):
        field, exact = jf.SelfAttention(beta=b), softmax_rates(MODES, 2, b)
        rates = jf.growth_rates(field, MODES.tolist(), 2)
        np.testing.assert_allclose(rates, exact, rtol=0, atol=ROUNDING)
        noisy = jf.growth_rates(field, MODES.tolist(), 2, kappa=20.0)
        np.testing.assert_allclose(noisy, exact - MODES**2 / 20, rtol=0, atol=ROUNDING)
        mode = jf.fastest_mode(field, 2)
        assert mode.degree == fastest
        np.testing.assert_allclose(mode.rate, exact.max(), rtol=ROUNDING)
    np.testing.assert_allclose(jf.growth_rates(jf.SelfAttention(beta=5.0), 3, 2), 0.68267833, 1e-8)


def test_unnormalised_attention_in_five_dimensions():
    """With int e^{b s} of the sphere, Gamma(d/2) (2/b)^{d/2-1} I_{d/2-1}(b), for a factor."""
    b, d, k = 4.0, 5, np.arange(1, 7)
    field = jf.SelfAttention(beta=b, interaction=jf.Unnormalised())
    mass = gamma(d / 2) * (2 / b) ** (d / 2 - 1) * iv(d / 2 - 1, b)
    rates = jf.growth_rates(field, k.tolist(), d)
    np.testing.assert_allclose(rates, mass * softmax_rates(k, d, b), rtol=0, atol=ROUNDING)


def test_any_kernel_by_quadrature():
    """X[mu](x) = P_x int phi'(<x, y>) y mu(dy) has the rate k (k+d-2) int phi P_k on the sphere,
    by the formula of Funk and Hecke: phi = log(1 + e^{b s}) / b for sigmoid attention, here on S^2,
    where P_k is Legendre's polynomial and s is uniform."""
    b, k = 3.0, np.arange(1, 6)
    phi = lambda s: np.log1p(np.exp(b * s)) / b
    legendre = np.polynomial.legendre.Legendre.basis
    exact = [j * (j + 1) * quad(lambda s, j=j: phi(s) * legendre(j)(s) / 2, -1, 1)[0] for j in k]
    field = jf.SelfAttention(beta=b, interaction=jf.Sigmoid())
    # Of the even degrees but 0 phi has none: 1/2 is all that is even in its slope.
    assert np.abs(exact[1::2]).max() > 1e-3
    rates = jf.growth_rates(field, k.tolist(), 3)
    np.testing.assert_allclose(rates, exact, rtol=0, atol=ROUNDING)


def test_sinkhorn_attention_is_slower_by_its_multiplier():
    """Its potential answers a mode by -m / (1 + m) of it, m the multiplier of the kernel, so that
    1 / (1 + m_k) of the mode is seen."""
    k, field = np.array([1, 3]), jf.SelfAttention(beta=5.0, interaction=jf.Sinkhorn())
    exact = softmax_rates(k, 2, 5.0) / (1 + multiplier(k, 2, 5.0))
    rates = jf.growth_rates(field, k.tolist(), 2, nodes=20)
    np.testing.assert_allclose(rates, exact, rtol=0, atol=1e-11)


def test_a_larger_sphere_and_a_turning_value():
    """On |x| = R attention is that of the unit sphere at beta R^2; with V a rotation by phi in the
    plane modes turn, and grow at cos(phi) times the rate."""
    k, phi = np.arange(1, 5), 0.4
    V = np.array([[np.cos(phi), -np.sin(phi)], [np.sin(phi), np.cos(phi)]])
    field = jf.SelfAttention(value=V, beta=1.2, interaction=jf.L2(), geometry=jf.Sphere(2.0))
    exact = np.cos(phi) * softmax_rates(k, 2, 4.8) - k**2 / (30 * 4)
    rates = jf.growth_rates(field, k.tolist(), 2, kappa=30.0)
    np.testing.assert_allclose(rates, exact, rtol=0, atol=ROUNDING)


def test_the_derivative_in_beta_under_jit():
    """d/db of k^2 I_k / (b I_0), k = 3."""
    b = 5.0
    rate = lambda b: jf.growth_rates(jf.SelfAttention(beta=b), 3, 2, nodes=32)
    exact = softmax_rates(3, 2, b) * (ivp(3, b) / iv(3, b) - 1 / b - iv(1, b) / iv(0, b))
    np.testing.assert_allclose(jax.jit(jax.grad(rate))(b), exact, rtol=0, atol=ROUNDING)


def test_waves_on_the_line():
    """Mean shift: xi^2 / b e^{-xi^2 / 2b}. Bounded confidence, radius 1: sin(xi) / xi - cos(xi)."""
    xi = np.array([0.5, 2.0, 3.0])
    rates = wave_rates(jf.MeanShift(2.0), xi, reach=6.0, kappa=10.0)
    exact = xi**2 / 2 * np.exp(-(xi**2) / 4) - xi**2 / 10
    # e^{-36} is left out at the ends of the interval.
    np.testing.assert_allclose(rates, exact, rtol=0, atol=ROUNDING)
    rates = wave_rates(jf.BoundedConfidence(1.0), xi, reach=1.0)
    # The midpoint rule: xi^3 / 24 (2 / 128)^2 and some.
    np.testing.assert_allclose(rates, np.sin(xi) / xi - np.cos(xi), rtol=0, atol=3e-4)


def test_what_has_no_modes_is_refused():
    attention = jf.SelfAttention(geometry=jf.Euclidean())
    with pytest.raises(ValueError, match="call jaxflow.stability.wave_rates"):
        jf.growth_rates(attention, 1, 2)
    with pytest.raises(ValueError, match="call jaxflow.growth_rates for the sphere"):
        wave_rates(jf.SelfAttention(), 1.0, reach=1.0)
    with pytest.raises(ValueError, match="causal=True.* has none"):
        jf.growth_rates(jf.SelfAttention(causal=True), 1, 2)
    with pytest.raises(ValueError, match="a degree must be at least 1, got 0"):
        jf.growth_rates(jf.SelfAttention(), [1, 0], 2)
    with pytest.raises(ValueError, match="kappa must be positive"):
        wave_rates(jf.MeanShift(), 1.0, reach=1.0, kappa=0.0)
    with pytest.raises(ValueError, match="pass most=4"):
        jf.fastest_mode(jf.SelfAttention(beta=5.0), 2, most=2, nodes=16)
    with pytest.raises(ValueError, match="the field moves the uniform law"):
        jf.growth_rates(jf.SelfAttention(value=np.diag([1.0, 2.0])), 1, 2)
    with pytest.raises(ValueError, match="modes of one degree"):
        jf.growth_rates(jf.SelfAttention(beta=5.0), [3, 30], 2, nodes=16)  # on 32 points, as mode 2


# ------------------------------------------------------------------ clusters


def test_clusters_form_where_the_leading_mode_says():
    """Tokens with the mode 3 of size 0.01 and the others of 1/40 of that, at b = 5."""
    a = 2 * np.pi * np.arange(60) / 60
    k, phases = np.arange(1, 6)[:, None], np.array([0.3, 1.0, 2.0, 4.0, 5.0])[:, None]
    sizes = np.where(k == 3, 0.01, 0.01 / 40)
    # The density of a + f(a) is 1 - f': modes of f' are minus those of the law.
    mu = jf.measure.from_angles(a - (sizes / k * np.sin(k * a - phases)).sum(axis=0))
    field = jf.SelfAttention(beta=5.0)
    found = jf.predict_clusters(field, mu)
    assert found.degree == 3
    np.testing.assert_allclose(found.phase, 2.0, atol=0.03)
    np.testing.assert_allclose(found.time, np.log(100) / softmax_rates(3, 2, 5.0), rtol=2e-3)
    np.testing.assert_allclose(np.abs(found.modes[:5]), sizes[:, 0] / 2, rtol=0.05)
    last = jf.flow(field, mu, t1=14.0, adjoint=diffrax.ForwardMode()).last
    assert jf.observables.cluster_count(last, threshold=0.99) == 3
    distance = jnp.arccos(jnp.clip(last.points @ found.measure.points.T, -1, 1)).min(axis=1)
    assert distance.max() < 0.1, distance


def test_a_symmetry_of_the_tokens_is_kept():
    """A law with two equal halves has no mode 3, though that would be the fastest."""
    a = 2 * np.pi * np.arange(64) / 64
    mu = jf.measure.from_angles(a - 0.01 * np.sin(2 * a - 1.0))
    found = jf.predict_clusters(jf.SelfAttention(beta=5.0), mu)
    assert found.degree == 2
    np.testing.assert_allclose(np.sort(found.angles), [0.5, 0.5 + np.pi], atol=1e-3)


def test_no_clusters_are_predicted_where_none_form():
    mu = jf.measure.circle(8)
    with pytest.raises(ValueError, match="breaks into no clusters"):
        jf.predict_clusters(jf.SelfAttention(beta=5.0), mu, kappa=1.0)
    with pytest.raises(ValueError, match="one system on the circle"):
        jf.predict_clusters(jf.SelfAttention(), jf.measure.simplex(3, 3, 0.0))


# ------------------------------------------------------------------ Jacobians


def test_the_symmetric_part_and_the_leading_eigenvalues():
    """A drift A on R^2, once a token: eigenvalues of A, of its symmetric part, and of both the
    first by Arnoldi's method."""
    A = np.array([[0.3, 1.0], [0.0, -0.5]])
    field, mu = jf.LinearDrift(A), jf.Measure(jnp.ones((3, 2)))
    for symmetric, exact in ((False, [0.3, -0.5]), (True, np.linalg.eigvalsh((A + A.T) / 2)[::-1])):
        found = jf.jacobian_spectrum(field, mu, symmetric=symmetric)
        np.testing.assert_allclose(found, np.repeat(exact, 3), rtol=0, atol=ROUNDING)
        first = jf.jacobian_spectrum(field, mu, symmetric=symmetric, leading=1)
        np.testing.assert_allclose(first, exact[:1], rtol=0, atol=ROUNDING)


def test_the_symmetric_part_bounds_growth_on_an_ellipsoid():
    """With E = <v, v> / 2 in the inner product of the geometry, dE/dt = <v, J v> is the Rayleigh
    quotient of the symmetric part: its trace is the mean over all v, the divergence of J."""
    geometry = jf.Ellipsoid(jnp.array([1.0, 2.0, 0.5]), jnp.zeros(3))
    x = geometry.retract(jnp.asarray(np.random.default_rng(0).normal(size=(3, 3))))
    field, mu = jf.SelfAttention(beta=0.3, geometry=geometry), jf.Measure(x)
    real = jf.jacobian_spectrum(field, mu, symmetric=True)
    both = jf.jacobian_spectrum(field, mu)
    assert real.shape == (3,)  # two normals a token: LayerNorm centres
    np.testing.assert_allclose(both.sum(), real.sum(), rtol=0, atol=ROUNDING)
    assert both.real.max() <= real[0] + ROUNDING


def test_jacobians_refuse():
    field, mu = jf.SelfAttention(), jf.measure.circle(4)
    with pytest.raises(ValueError, match="jax.vmap it over several"):
        jf.jacobian_spectrum(field, jf.Measure(mu.points[None]))
    with pytest.raises(ValueError, match="up to 2 eigenvalues of 4 tokens in R.2, got leading=3"):
        jf.jacobian_spectrum(field, mu, leading=3)
