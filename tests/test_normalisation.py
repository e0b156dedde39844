"""Normalisation schemes against the laws of arXiv 2510.22026, and LayerNorm as geometry."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf

pytestmark = pytest.mark.usefixtures("x64")

slow = pytest.mark.slow
ALPHA = 0.5
TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-12)


def attention(beta=1.0, geometry=None):
    return jf.SelfAttention(beta=beta, geometry=geometry or jf.Euclidean())


SCHEMES = {
    "post": lambda: jf.PostNorm(attention()),
    "pre": lambda: jf.PreNorm(attention(), jf.UnitNorm()),
    "peri": lambda: jf.PeriNorm(jf.PreNorm(attention(), jf.UnitNorm()), jf.UnitNorm()),
    "ngpt": lambda: jf.NGPT(attention(), ALPHA),
    "sqrt": lambda: jf.SqrtScaling(jf.PostNorm(attention())),
}


def norms(x):
    return jnp.linalg.norm(x, axis=1, keepdims=True)


def gap(mu):
    """1 - rho of equiangular directions, |theta_1 - theta_2|^2 / 2."""
    x = np.asarray(mu.points)
    theta = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return ((theta[..., 0, :] - theta[..., 1, :]) ** 2).sum(-1) / 2


# What 1 - rho is an exponential in, its rate, and two late times.
RATES = {
    "post": (lambda t: t, -2, (7.0, 9.0)),
    "pre": (np.log, -2, (1e5, 1e6)),
}


@pytest.mark.parametrize("scheme", RATES)
def test_f17_rates_of_collapse(scheme):
    """1 - rho of equiangular tokens: Post e^{-2t}, Pre t^{-2}. The other schemes' rates are those
    of examples/normalisation_schemes.py, which test_examples.py runs."""
    clock, rate, (start, end) = RATES[scheme]
    sol = jf.flow(
        SCHEMES[scheme](),
        jf.measure.simplex(6, 6),
        t1=end,
        saveat=diffrax.SaveAt(ts=jnp.array([start, end])),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-14),
    )
    first, last = np.log(gap(sol.measures))
    # The next term is smaller by 1 - rho (below 1e-6) or, where r = t + const, by 1/t.
    np.testing.assert_allclose((last - first) / (clock(end) - clock(start)), rate, rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_f17_speeds_of_the_direction(scheme, key):
    """theta' = P_theta A / s with s = 1, r, r |A|, |A| / alpha, sqrt(t+1), and r' = <theta, A>
    (Pre), <theta, A> / |A| (Peri), else 0."""
    t = 0.7
    x = jax.random.normal(key, (9, 4))
    if scheme not in ("pre", "peri"):
        x = x / norms(x)
    r = norms(x)
    theta = x / r
    a = attention()(0.0, theta, jf.Measure(theta))
    s, radial = {
        "post": (1, 0),
        "pre": (r, (theta * a).sum(1, keepdims=True)),
        "peri": (r * norms(a), (theta * a).sum(1, keepdims=True) / norms(a)),
        "ngpt": (norms(a) / ALPHA, 0),
        "sqrt": (np.sqrt(t + 1), 0),
    }[scheme]
    velocity = SCHEMES[scheme]()(t, x, jf.Measure(x))
    across = jf.Sphere().project(theta, velocity) / r
    np.testing.assert_allclose(across, jf.Sphere().project(theta, a) / s, rtol=1e-12, atol=1e-14)
    along = (theta * velocity).sum(1, keepdims=True)
    np.testing.assert_allclose(along, radial * np.ones((9, 1)), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_a_curve_of_post_norms_has_their_ellipsoid(key):
    gain, bias = np.array([1.0, 2.0, 0.5, 1.5]), np.zeros(4)
    attention = jf.MultiHeadAttention(4, 2, key=key)
    field = jf.TimeDependent(jf.Constant(jf.PostNorm(attention, jf.Ellipsoid(gain, bias))))
    x = field.geometry.retract(jax.random.normal(key, (5, 4)))
    points = jf.flow(field, jf.Measure(x), t1=0.1).measures[-1].points
    np.testing.assert_allclose(field.geometry.retract(points), points, rtol=1e-10)
    with pytest.raises(ValueError, match="would move in time"):
        jf.PiecewiseConstant([field, field], [1.0])


def test_unit_norm_leaves_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(jf.UnitNorm(2.0)(x), [[1.2, 1.6], [0, 0]], rtol=1e-15)
    assert np.isfinite(jax.grad(lambda x: jf.UnitNorm()(x).sum())(x)).all()


@pytest.mark.parametrize("scheme", [jf.PostNorm, jf.NGPT])
def test_a_scheme_takes_a_field_on_flat_space(scheme):
    with pytest.raises(ValueError, match="geometry=jaxflow.Euclidean"):
        scheme(jf.SelfAttention())


# ------------------------------------------------------------------ LayerNorm as geometry


@pytest.mark.slow
def test_an_ellipsoid_is_a_sphere_in_other_coordinates(key):
    """x = g z: attention with Q, K, V on the ellipsoid is attention with Q G, K G, G^-1 V G on the
    sphere of radius sqrt(d), G = diag(g)."""
    d = 4
    g = jnp.array([0.5, 1.0, 2.0, 1.5])
    q, k, v = jax.random.normal(key, (3, d, d))
    z = jf.Sphere(2.0).retract(jax.random.normal(jax.random.key(1), (7, d)))
    on_sphere = jf.SelfAttention(
        q * g[None], k * g[None], v * g[None] / g[:, None], beta=0.3, geometry=jf.Sphere(2.0)
    )
    geometry = jf.Ellipsoid(g, centred=False)
    on_ellipsoid = jf.SelfAttention(q, k, v, beta=0.3, geometry=geometry)
    options = {"t1": 1.5, "stepsize_controller": TIGHT}
    expected = jf.flow(on_sphere, jf.Measure(z), **options).measures.points[-1] * g[None]
    for solver in (diffrax.Tsit5(), jf.solvers.Geodesic(diffrax.Tsit5())):
        sol = jf.flow(on_ellipsoid, jf.Measure(z * g[None]), solver=solver, **options)
        np.testing.assert_allclose(sol.measures.points[-1], expected, rtol=0, atol=1e-8)
        assert geometry.contains(sol.measures.points[-1]).all()


@slow
def test_layer_norm_without_gain_keeps_centred_tokens_on_the_sphere(key):
    """V = I keeps sum_i z_i = 0, so the centred geometry and the whole sphere give one flow."""
    geometry = jf.Ellipsoid(jnp.ones(5))
    mu = jf.Measure(geometry.retract(jax.random.normal(key, (6, 5))))
    ends = [
        jf.flow(attention(0.4, space), mu, t1=2.0, stepsize_controller=TIGHT).measures.points[-1]
        for space in (geometry, jf.Sphere(np.sqrt(5)))
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-9)


def test_post_norm_is_the_limit_of_layers(key):
    """x <- retract(x + h F(x)) tends to the flow on the ellipsoid, with an error of order h."""
    geometry = jf.Ellipsoid(jnp.array([0.5, 1.0, 2.0, 1.5]), jnp.array([0.1, -0.2, 0.3, 0.0]))
    field = jf.PostNorm(attention(0.5), geometry)
    start = geometry.retract(jax.random.normal(key, (5, 4)))
    limit = jf.flow(field, jf.Measure(start), t1=1.0, stepsize_controller=TIGHT)

    def layers(count):
        step = lambda _, x: geometry.retract(x + field.field(0.0, x, jf.Measure(x)) / count)
        return jax.lax.fori_loop(0, count, step, start)

    errors = [float(jnp.abs(layers(n) - limit.measures.points[-1]).max()) for n in (64, 128)]
    assert errors[1] < 0.02
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.05)


@pytest.mark.parametrize("centred", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_divergence_on_an_ellipsoid(centred, key):
    """The closed form for attention against derivatives."""
    d = 4
    geometry = jf.Ellipsoid(jnp.array([0.5, 1.0, 2.0, 1.5]), centred=centred)
    mu = jf.Measure(geometry.retract(jax.random.normal(key, (6, d))))
    field = jf.SelfAttention(*jax.random.normal(jax.random.key(1), (3, d, d)), geometry=geometry)
    exact = jf.divergence(field, 0.0, mu.points, mu)
    by_derivatives = jf.fields.base.divergence_by_derivatives(field, 0.0, mu.points, mu)
    np.testing.assert_allclose(exact, by_derivatives, rtol=1e-10)


def test_fields_on_one_ellipsoid_add_up():
    gain = jnp.array([0.5, 1.0, 2.0])
    one, other = (attention(1.0, jf.Ellipsoid(g)) for g in (gain, 2 * gain))
    both = one + attention(2.0, jf.Ellipsoid(gain))
    assert isinstance(both.geometry, jf.Ellipsoid)
    with pytest.raises(ValueError, match="must live on one geometry"):
        jf.Sum((one, other))
