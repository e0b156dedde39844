"""Measures and their samplers.

Exact properties hold to rounding: 1e-14 is some tens of machine epsilons of float64. Statistics of
n independent samples hold within 5 standard errors, sqrt(Var / n), with a fixed key.
"""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ive

import jaxflow as jf
from jaxflow.measure import (
    Measure,
    circle,
    from_angles,
    from_image,
    from_text,
    gaussian,
    kuramoto,
    simplex,
    uniform_sphere,
    von_mises_fisher,
)

KEY = jax.random.key(0)
x64 = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


@jax.jit
def sample_von_mises_fisher(mean, concentration):
    """20,000 points; direction and concentration are data, so one dimension compiles once."""
    return von_mises_fisher(20_000, mean, concentration, key=KEY).points


def gram(mu: Measure):
    return np.asarray(jf.observables.inner_products(mu))


def close_to_mean(samples, expected, variance):
    """|sample mean - expected| <= 5 sqrt(variance / n), entry by entry."""
    samples = np.asarray(samples, np.float64)
    error = np.abs(samples.mean(axis=0) - expected)
    assert (error <= 5 * np.sqrt(variance / len(samples))).all(), error


# ------------------------------------------------------------------ Measure


@x64
def test_weights_are_normalised():
    points = jnp.ones((4, 2))
    uniform, weighted = Measure(points), Measure(points, jnp.log(jnp.array([1.0, 2.0, 3.0, 4.0])))
    np.testing.assert_allclose(uniform.weights, 0.25, rtol=1e-15)
    np.testing.assert_allclose(weighted.weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-14)
    assert weighted.log_weights is not None
    shifted = Measure(points, weighted.log_weights + 100)
    # A shift by 100 rounds the logarithms by 100 ulp.
    np.testing.assert_allclose(shifted.weights, weighted.weights, rtol=1e-13)
    assert (uniform.n, uniform.d) == (4, 2)


def test_a_token_of_log_weight_minus_infinity_has_no_mass():
    mu = Measure(jnp.ones((3, 2)), jnp.array([0.0, -jnp.inf, 0.0]))
    np.testing.assert_allclose(mu.weights, [0.5, 0.0, 0.5], rtol=1e-6)
    assert mu.log_probabilities[1] == -jnp.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_half_precision_tokens_are_float32(dtype, compiles):
    compiles(dtype)
    mu = Measure(jnp.ones((3, 2), dtype))
    assert mu.points.dtype == dtype
    assert mu.weights.dtype == jnp.float32
    assert Measure(mu.points, jnp.zeros(3, dtype)).weights.dtype == jnp.float32


def test_indexing_runs_over_the_leading_axis():
    points = normal(0, 3, 5, 4, 2)
    mu = Measure(points)
    assert len(mu) == 3
    assert jnp.array_equal(mu[-1].points, points[-1])
    assert jnp.array_equal(mu[1, 2].points, points[1, 2])
    assert jnp.array_equal(mu[:2].points, points[:2])
    assert jnp.array_equal(mu[jnp.array([2, 0])].points, points[jnp.array([2, 0])])


def test_iteration_ends_after_the_last_measure():
    points = normal(0, 3, 4, 2)
    measures = list(islice(iter(Measure(points)), 10))
    assert len(measures) == 3
    assert all(jnp.array_equal(m.points, p) for m, p in zip(measures, points, strict=True))


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range: .* axis has 3"):
        Measure(normal(0, 3, 4, 2))[index]


def test_indexing_keeps_shared_weights_and_indexes_separate_ones():
    points = normal(0, 3, 4, 2)
    shared, separate = jnp.arange(4.0), jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(Measure(points, shared)[1].log_weights, shared)
    np.testing.assert_array_equal(Measure(points, separate)[1].log_weights, separate[1])
    assert Measure(points)[1].log_weights is None
    weights = jnp.broadcast_to(jax.nn.softmax(shared), (3, 4))
    np.testing.assert_allclose(Measure(points, shared).weights, weights, rtol=1e-6)  # float32


def test_one_measure_has_no_leading_axis():
    mu = Measure(jnp.ones((4, 2)))
    for access in (lambda: mu[0], lambda: len(mu)):
        with pytest.raises(TypeError, match="no leading axis of times or systems"):
            access()


@x64
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("weights", ["none", "shared", "separate"])
def test_expectation_mean_and_covariance(batch, weights):
    """E_mu[f] = sum_j w_j f(x_j), for f with values of any shape; as NumPy's weighted moments."""
    points = normal(0, *batch, 6, 3)
    shape = {"none": None, "shared": (6,), "separate": (*batch, 6)}[weights]
    mu = Measure(points, None if shape is None else normal(1, *shape))
    second = mu.expectation(lambda x: x[:, None] * x[None, :])
    norm = mu.expectation(lambda x: (x**2).sum())
    assert mu.expectation(lambda x: x).shape == (*batch, 3)
    np.testing.assert_allclose(mu.expectation(lambda x: x), mu.mean, rtol=0, atol=1e-14)
    np.testing.assert_allclose(mu.expectation(lambda x: jnp.asarray(1.0)), 1, rtol=1e-14)
    np.testing.assert_allclose(norm, jnp.trace(second, axis1=-2, axis2=-1), rtol=1e-14)
    flat_points, flat_weights = (
        np.asarray(a).reshape(-1, 6, *a.shape[len(batch) + 1 :]) for a in (mu.points, mu.weights)
    )
    means = np.stack([np.average(p, 0, w) for p, w in zip(flat_points, flat_weights, strict=True)])
    covariances = np.stack(
        [np.cov(p.T, aweights=w, ddof=0) for p, w in zip(flat_points, flat_weights, strict=True)]
    )
    np.testing.assert_allclose(mu.mean, means.reshape(*batch, 3), rtol=0, atol=1e-14)
    np.testing.assert_allclose(mu.covariance, covariances.reshape(*batch, 3, 3), rtol=0, atol=1e-14)


@x64
def test_push_forward_moves_points_and_keeps_weights():
    """E_{f # mu}[g] = E_mu[g o f], also where f changes the dimension."""
    points = normal(0, 2, 5, 3)
    mu = Measure(points, jnp.arange(5.0))
    f = lambda x: jnp.stack([x @ x, x[0]])
    g = lambda y: jnp.sin(y[0]) * y[1]
    nu = mu.push_forward(f)
    assert nu.points.shape == (2, 5, 2)
    assert nu.log_weights is mu.log_weights
    np.testing.assert_allclose(nu.expectation(g), mu.expectation(lambda x: g(f(x))), rtol=1e-14)


def test_a_measure_goes_through_transformations():
    """jit, vmap and grad see a measure as its arrays."""
    points = normal(0, 3, 4, 2)
    mu = Measure(points, jnp.arange(4.0))
    doubled = jax.jit(lambda mu: mu.push_forward(lambda x: 2 * x))(mu)
    np.testing.assert_array_equal(doubled.points, 2 * points)
    means = jax.vmap(lambda p: Measure(p, mu.log_weights).mean)(points)
    np.testing.assert_allclose(means, mu.mean, rtol=0, atol=1e-6)  # float32
    gradient = jax.grad(lambda mu: mu.mean.sum())(mu[0])
    expected = jnp.broadcast_to(mu.weights[0][:, None], (4, 2))
    np.testing.assert_allclose(gradient.points, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize(
    "points, log_weights, error, message",
    [
        (np.ones(3), None, ValueError, r"points must have shape \(\*batch, n, d\).* got \(3,\)"),
        (np.ones((0, 2)), None, ValueError, r"at least one token .* got \(0, 2\)"),
        (np.ones((2, 0)), None, ValueError, r"one dimension; got \(2, 0\)"),
        (np.ones((3, 2), int), None, TypeError, "points must be floating point, got int32. Cast"),
        (np.ones((3, 2)), np.ones(2), ValueError, r"one entry a token, shape \(3,\).* got \(2,\)"),
        (np.ones((4, 3, 2)), np.ones((2, 3)), ValueError, r"\(4, 3\) for points .* got \(2, 3\)"),
        (np.ones((3, 2)), np.ones(3, int), TypeError, "log_weights must be floating.* got int32"),
    ],
)
def test_bad_input_is_named(points, log_weights, error, message):
    with pytest.raises(error, match=message):
        Measure(points, log_weights)


# ------------------------------------------------------------------ samplers


TEXT = "The cat, the hat; the CAT."
IMAGE = np.arange(24.0).reshape(4, 6)
SAMPLERS = {
    "uniform_sphere": lambda: uniform_sphere(5, 3, key=KEY),
    "gaussian": lambda: gaussian(5, 3, key=KEY, mean=[1.0, 2.0, 3.0], covariance=np.eye(3)),
    "circle": lambda: circle(5, phase=1.0),
    "from_angles": lambda: from_angles([0.0, 1.0]),
    "simplex": lambda: simplex(5, 6, 0.2),
    "regular_simplex": lambda: simplex(3, 2, -0.5),
    "kuramoto": lambda: kuramoto(5, 0.3, phase=1.0),
    "from_text": lambda: from_text(TEXT, 8, key=KEY)[0],
    "from_image": lambda: from_image(IMAGE, 2),
}


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_follow_the_default_precision(name, enabled):
    """Under strict dtype and rank promotion, in both precisions."""
    with jax.enable_x64(enabled):
        mu = SAMPLERS[name]()
        assert mu.points.dtype == (jnp.float64 if enabled else jnp.float32)
        assert mu.log_weights is None
        assert jnp.isfinite(mu.points).all()


def test_uniform_sphere():
    """|x| = R, E x = 0, E x x^T = R^2 I/d, E x_1^4 = 3 R^4 / (d (d+2))."""
    n, d, radius = 20_000, 3, 2.0
    x = np.asarray(uniform_sphere(n, d, key=KEY, radius=radius).points, np.float64)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), radius, rtol=1e-6)  # float32
    fourth = 3 * radius**4 / (d * (d + 2))
    close_to_mean(x, 0, radius**2 / d)
    close_to_mean(x**2, radius**2 / d, fourth - (radius**2 / d) ** 2)
    close_to_mean(x[:, 0] * x[:, 1], 0, fourth / 3)
    # E x_1^8 = 105 R^8 / (d (d+2) (d+4) (d+6))
    eighth = 105 * radius**8 / (d * (d + 2) * (d + 4) * (d + 6))
    close_to_mean(x**4, fourth, eighth - fourth**2)


def test_gaussian_moments():
    """Coordinates have the law N(m_i, C_ii); Var (x_i - m_i)(x_j - m_j) = C_ii C_jj + C_ij^2."""
    mean = np.array([1.0, -2.0])
    covariance = np.array([[2.0, 0.6], [0.6, 0.5]])
    x = np.asarray(gaussian(20_000, 2, key=KEY, mean=mean, covariance=covariance).points, float)
    close_to_mean(x, mean, np.diag(covariance))
    for i, j in [(0, 0), (0, 1), (1, 1)]:
        products = (x[:, i] - mean[i]) * (x[:, j] - mean[j])
        variance = covariance[i, i] * covariance[j, j] + covariance[i, j] ** 2
        close_to_mean(products, covariance[i, j], variance)


@x64
def test_gaussian_with_numbers_is_the_scaled_standard_gaussian():
    """The same key: N(m, s^2) is m + s z."""
    z = gaussian(7, 3, key=KEY).points
    x = gaussian(7, 3, key=KEY, mean=1.5, covariance=4.0).points
    np.testing.assert_allclose(x, 1.5 + 2 * z, rtol=0, atol=1e-14)


def test_gaussian_covariance_must_fit():
    with pytest.raises(ValueError, match=r"number or shape \(3, 3\), got \(2, 2\)"):
        gaussian(4, 3, key=KEY, covariance=np.eye(2))


@pytest.mark.parametrize(
    "d, kappa",
    [
        (2, 300.0),
        pytest.param(2, 0.5, marks=pytest.mark.slow),
        pytest.param(5, 4.0, marks=pytest.mark.slow),
        (5, 30.0),
    ],
)
def test_von_mises_fisher(d, kappa):
    """E<m, x> = A = I_{d/2}(kappa) / I_{d/2-1}(kappa), Var<m, x> = 1 - A^2 - (d-1) A/kappa.

    Tangential coordinates have mean 0 and variance A/kappa (Mardia and Jupp, Directional
    Statistics, sec. 9.3).
    """
    direction = np.arange(1.0, d + 1)
    x = np.asarray(sample_von_mises_fisher(direction, kappa), np.float64)
    m = direction / np.linalg.norm(direction)
    length = ive(d / 2, kappa) / ive(d / 2 - 1, kappa)
    close_to_mean(x @ m, length, 1 - length**2 - (d - 1) * length / kappa)
    tangent = np.array([m[1], -m[0], *[0.0] * (d - 2)]) / np.hypot(m[0], m[1])
    close_to_mean(x @ tangent, 0, length / kappa)
    spread = (x @ tangent) ** 2
    close_to_mean(spread, length / kappa, spread.var())


@pytest.mark.parametrize("d", [2, 5])
def test_von_mises_fisher_is_on_the_sphere(d):
    """Also where the draw of the tangent was close to the mean, as some of 20,000 are for d = 2."""
    x = np.asarray(sample_von_mises_fisher(np.arange(1.0, d + 1), 0.5), np.float64)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)  # float32


@pytest.mark.parametrize("enabled", [False, True], ids=["float32", "float64"])
def test_von_mises_fisher_follows_the_default_precision(enabled):
    with jax.enable_x64(enabled):
        mu = jax.eval_shape(lambda: von_mises_fisher(5, [3.0, -4.0], 2.0, key=KEY))
        assert mu.points.dtype == (jnp.float64 if enabled else jnp.float32)
        assert mu.points.shape == (5, 2)


@pytest.mark.parametrize("mean", [[1.0], [[1.0, 0.0]]], ids=["d=1", "matrix"])
def test_von_mises_fisher_needs_a_direction(mean):
    with pytest.raises(ValueError, match=r"direction of shape \(d,\), d >= 2; got"):
        von_mises_fisher(4, mean, 1.0, key=KEY)


@x64
def test_circle_is_equispaced():
    """x_j = (cos, sin)(phase + 2 pi j / n), counter-clockwise."""
    n, phase = 7, 0.4
    x = circle(n, phase=phase).points
    angles = phase + 2 * np.pi * np.arange(n) / n
    np.testing.assert_allclose(x, np.stack([np.cos(angles), np.sin(angles)], 1), rtol=0, atol=1e-14)


@x64
def test_from_angles_keeps_leading_axes():
    angles = np.linspace(-4, 4, 6).reshape(2, 3)
    mu = from_angles(angles)
    assert mu.points.shape == (2, 3, 2)
    np.testing.assert_allclose(mu.points[..., 0], np.cos(angles), rtol=0, atol=1e-15)
    np.testing.assert_allclose(mu.points[..., 1], np.sin(angles), rtol=0, atol=1e-15)


@x64
@pytest.mark.parametrize(
    "n, d, rho",
    [
        (5, 5, 0.0),
        (5, 7, 0.3),
        (5, 5, -0.25),
        (5, 4, -0.25),
        (4, 3, -1 / 3),
        (3, 2, -0.5),
        (2, 1, -1.0),
        (6, 6, 1.0),
        (1, 3, 0.5),
    ],
)
def test_simplex_inner_products(n, d, rho):
    """<x_i, x_j> = rho for i != j and 1 for i = j; with d = n - 1 for the regular simplex."""
    mu = simplex(n, d, rho)
    assert mu.points.shape == (n, d)
    # Near the lowest rho a square root takes the rounding of 1 + (n-1) rho, about 1e-16, to 1e-8
    # along the vector of ones; its square is back at rounding.
    expected = rho + (1 - rho) * np.eye(n)
    np.testing.assert_allclose(gram(mu), expected, rtol=0, atol=1e-14)


def test_the_regular_simplex_in_float32():
    """rho = -1/(n-1) is recognised up to rounding of float32."""
    np.testing.assert_allclose(
        gram(simplex(4, 3, -1 / 3)), np.eye(4) * 4 / 3 - 1 / 3, rtol=0, atol=1e-6
    )


@x64
def test_simplex_with_traced_inner_product():
    """rho is data, and the derivative of <x_1, x_2> in rho is 1."""
    product = jax.jit(lambda rho: simplex(4, 5, rho).points[0] @ simplex(4, 5, rho).points[1])
    for rho in (-0.2, 0.0, 0.7):
        np.testing.assert_allclose(product(rho), rho, rtol=0, atol=1e-14)
        np.testing.assert_allclose(jax.grad(product)(rho), 1, rtol=1e-12)


@pytest.mark.parametrize(
    "n, d, rho, message",
    [
        (4, 4, -0.5, r"4 unit vectors need -0.333333 <= rho <= 1, got -0.5"),
        (4, 4, 1.5, r"4 unit vectors need -0.333333 <= rho <= 1, got 1.5"),
        (4, 3, 0.0, r"span 4 dimensions; got d=3"),
        (4, 2, -1 / 3, r"span 3 dimensions; got d=2"),
        (0, 2, 0.0, r"n must be at least 1, got 0"),
        (2, 0, 0.0, r"d must be at least 1, got 0"),
    ],
)
def test_simplices_that_do_not_exist(n, d, rho, message):
    with pytest.raises(ValueError, match=message):
        simplex(n, d, rho)


@x64
@pytest.mark.parametrize("r", [0.0, 0.2, 0.5])
def test_kuramoto_moments(r):
    """E e^{i k a} = r^k e^{i k phase} for the Poisson kernel.

    The midpoints are a rule of n nodes for a periodic analytic function of u whose coefficients
    decay like r^l: the error r^n is below rounding.
    """
    n, phase = 64, 0.7
    x = np.asarray(kuramoto(n, r, phase=phase).points)
    z = x[:, 0] + 1j * x[:, 1]
    for k in (1, 2, 3):
        expected = r**k * np.exp(1j * k * phase)
        np.testing.assert_allclose((z**k).mean(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("r", [-0.1, 1.0, 1.5])
def test_kuramoto_order_parameter_must_be_below_one(r):
    with pytest.raises(ValueError, match=rf"order parameter must be in \[0, 1\), got {r}"):
        kuramoto(8, r)


@x64
@pytest.mark.parametrize("d", [7, 8])
def test_from_text_gives_equal_words_equal_vectors(d):
    """Without positions the token of a word depends on the word alone, up to its case."""
    mu, tokens = from_text(TEXT, d, key=KEY, position_scale=0.0)
    assert tokens == ["The", "cat", ",", "the", "hat", ";", "the", "CAT", "."]
    words = [t.lower() for t in tokens]
    products = gram(mu)
    for i, a in enumerate(words):
        for j, b in enumerate(words):
            assert (abs(products[i, j] - 1) < 1e-14) == (a == b), (a, b, products[i, j])


@x64
def test_from_text_adds_positions():
    """x is proportional to e(word) + s p_j, |e| = |p| = 1, <p_i, p_j> = 2/d sum_k cos((i-j) w_k).

    With s = 1e6 the direction is that of p_j up to an angle of 1e-6, so that products are off by
    at most 2e-6.
    """
    d = 8
    mu, tokens = from_text(TEXT, d, key=KEY)
    n = len(tokens)
    np.testing.assert_allclose(jnp.linalg.norm(mu.points, axis=1), 1, rtol=1e-14)
    the = [i for i, t in enumerate(tokens) if t.lower() == "the"]
    assert gram(mu)[the[0], the[1]] < 0.999
    rates = 10000.0 ** (-np.arange(0, d, 2) / d)
    lags = np.arange(n)[:, None] - np.arange(n)[None, :]
    codes = np.cos(lags[..., None] * rates).mean(axis=-1)
    positions, _ = from_text(TEXT, d, key=KEY, position_scale=1e6)
    np.testing.assert_allclose(gram(positions), codes, rtol=0, atol=2e-6)
    # |e + s p|^2 = 1 + s^2 + 2 s <e, p>, so the scaled sum solves for x at s = 1/2.
    e = np.asarray(from_text(TEXT, d, key=KEY, position_scale=0.0)[0].points)
    angles = np.arange(n)[:, None] * rates
    p = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(n, d) / np.sqrt(d / 2)
    x = e + 0.5 * p
    np.testing.assert_allclose(
        mu.points, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=0, atol=1e-14
    )


def test_from_text_takes_the_first_tokens():
    mu, tokens = from_text(TEXT, 8, key=KEY, max_tokens=3)
    assert tokens == ["The", "cat", ","]
    assert (mu.n, mu.d) == (3, 8)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_from_text_needs_a_token(text):
    with pytest.raises(ValueError, match="the text has no token"):
        from_text(text, 4, key=KEY)


@pytest.mark.parametrize("channels", [None, 3])
def test_from_image_cuts_patches_in_raster_order(channels):
    shape = (4, 6) if channels is None else (4, 6, channels)
    image = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    mu = from_image(image, 2, unit=False)
    patches = [
        image[r : r + 2, c : c + 2].reshape(-1) for r in range(0, 4, 2) for c in range(0, 6, 2)
    ]
    np.testing.assert_array_equal(mu.points, np.stack(patches).astype(float))


@x64
def test_from_image_centres_and_normalises():
    image = np.random.default_rng(0).normal(size=(4, 6))
    raw = np.asarray(from_image(image, 2, unit=False).points)
    centred = raw - raw.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(from_image(image, 2).points, expected, rtol=0, atol=1e-14)


def test_a_patch_without_direction_becomes_the_first_axis():
    """A constant image: every patch equals the mean."""
    mu = from_image(np.ones((4, 4)), 2)
    np.testing.assert_array_equal(mu.points, np.tile([1.0, 0.0, 0.0, 0.0], (4, 1)))


@pytest.mark.parametrize(
    "shape, patch, message",
    [
        ((4,), 2, r"image must have shape \(height, width\[, channels\]\), got \(4,\)"),
        ((4, 4, 3, 1), 2, r"got \(4, 4, 3, 1\)"),
        ((4, 5), 2, r"sides of the image \(4, 5\) must be multiples of patch = 2"),
        ((4, 4), 0, r"patch must be at least 1, got 0"),
    ],
)
def test_images_that_do_not_fit(shape, patch, message):
    with pytest.raises(ValueError, match=message):
        from_image(np.ones(shape), patch)


@pytest.mark.parametrize(
    "sample",
    [
        lambda: uniform_sphere(0, 3, key=KEY),
        lambda: gaussian(0, 3, key=KEY),
        lambda: von_mises_fisher(0, [1.0, 0.0], 1.0, key=KEY),
        lambda: circle(0),
        lambda: kuramoto(0, 0.2),
    ],
)
def test_samplers_need_a_token(sample):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        sample()
