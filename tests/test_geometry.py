"""The spaces that tokens live on, against the identities that define them.

Tolerances: float64, and the results are sums of a few terms of size one, so 1e-13 is some hundred
rounding errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflow.geometry import Ellipsoid, Euclidean, Sphere

SPHERES = {"unit sphere": lambda: Sphere(), "sphere": lambda: Sphere(2.5)}
GAIN, BIAS = np.array([0.5, 1.0, 2.0, 1.5]), np.array([0.3, 0.0, -1.0, 2.0])
# Made within a test, where float64 is on.
GEOMETRIES = SPHERES | {
    "euclidean": lambda: Euclidean(),
    "layer norm": lambda: Ellipsoid(GAIN, BIAS),
    "rms norm": lambda: Ellipsoid(GAIN, centred=False),
}

pytestmark = pytest.mark.usefixtures("x64")
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, indirect=True)
every_sphere = pytest.mark.parametrize("geometry", SPHERES, indirect=True)


@pytest.fixture
def geometry(request, x64):
    return GEOMETRIES[request.param]()


def vectors(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def point_and_tangent(geometry, n=6, d=4):
    """Points of the space, and tangent vectors of length 0.1, 0.2, ... there."""
    x = geometry.retract(vectors(0, n, d))
    v = geometry.project(x, vectors(1, n, d))
    lengths = 0.1 * (1 + jnp.arange(n, dtype=v.dtype))
    return x, v * (lengths / norm(geometry, v))[:, None]


def norm(geometry, v):
    return jnp.sqrt(geometry.inner(v, v))


@every_geometry
def test_project_is_an_orthogonal_projection(geometry):
    """P^2 = P and <P v, w> = <v, P w>."""
    x, _ = point_and_tangent(geometry)
    v, w = vectors(2, 6, 4), vectors(3, 6, 4)
    pv, pw = geometry.project(x, v), geometry.project(x, w)
    np.testing.assert_allclose(geometry.project(x, pv), pv, rtol=0, atol=1e-13)
    one, other = geometry.inner(pv, w), geometry.inner(v, pw)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


@every_geometry
def test_normals_and_the_tangent_space_span_everything(geometry):
    """P v + sum_nu <nu, v> nu = v, with orthonormal nu."""
    x, _ = point_and_tangent(geometry)
    v = vectors(2, 6, 4)
    normals = geometry.normals(x)
    codimension = 2 if isinstance(geometry, Ellipsoid) and geometry.centred else 1
    assert len(normals) == (0 if isinstance(geometry, Euclidean) else codimension)
    total = geometry.project(x, v)
    for nu in normals:
        np.testing.assert_allclose(norm(geometry, nu), 1, rtol=1e-13)
        total = total + geometry.inner(nu, v)[:, None] * nu
    np.testing.assert_allclose(total, v, rtol=0, atol=1e-13)


@every_sphere
def test_retract_is_the_nearest_point(geometry):
    """|retract(x)| = R and |x - retract(x)| = | |x| - R |, the distance of x from the sphere."""
    x = vectors(0, 6, 4)
    y = geometry.retract(x)
    length = jnp.linalg.norm(x, axis=1)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), geometry.radius, rtol=1e-14)
    distance = jnp.linalg.norm(x - y, axis=1)
    np.testing.assert_allclose(distance, jnp.abs(length - geometry.radius), rtol=0, atol=1e-14)
    np.testing.assert_allclose(geometry.retract(y), y, rtol=1e-14)


def test_retract_leaves_euclidean_space_alone():
    x = vectors(0, 6, 4)
    assert jnp.array_equal(Euclidean().retract(x), x)


@every_geometry
def test_the_derivative_of_retract_is_the_projection(geometry):
    """D retract(x) v = P_x v at a point x of the space: why a retracted step keeps its order."""
    x, _ = point_and_tangent(geometry)
    v = vectors(2, 6, 4)
    _, derivative = jax.jvp(geometry.retract, (x,), (v,))
    np.testing.assert_allclose(derivative, geometry.project(x, v), rtol=0, atol=1e-13)


@every_geometry
def test_exp_travels_the_length_of_its_velocity(geometry):
    """exp stays in the space and distance(x, exp(x, v)) = |v| up to the cut locus."""
    x, v = point_and_tangent(geometry)
    y = geometry.exp(x, v)
    assert geometry.contains(y).all()
    length = norm(geometry, v)
    np.testing.assert_allclose(geometry.distance(x, y), length, rtol=1e-13)
    np.testing.assert_allclose(geometry.distance(y, x), length, rtol=1e-13)


@every_geometry
def test_exp_is_a_geodesic(geometry):
    """c(t) = exp(x, t v): c(0) = x, c'(0) = v, and P c'' = 0 along the whole curve."""
    x, v = point_and_tangent(geometry)
    curve = lambda t: geometry.exp(x, t * v)
    velocity = lambda t: jax.jvp(curve, (t,), (jnp.ones_like(t),))[1]
    zero, later = jnp.asarray(0.0), jnp.asarray(0.7)
    np.testing.assert_allclose(curve(zero), x, rtol=0, atol=2e-15)
    np.testing.assert_allclose(velocity(zero), v, rtol=0, atol=1e-14)
    acceleration = jax.jvp(velocity, (later,), (jnp.ones_like(later),))[1]
    tangential = geometry.project(curve(later), acceleration)
    np.testing.assert_allclose(tangential, jnp.zeros_like(x), rtol=0, atol=1e-13)


@every_geometry
@pytest.mark.parametrize("length", [0.0, 1e-3, 0.1, 0.5, 2.0])
def test_normal_coordinates(geometry, length):
    """exp_inverse_derivative undoes the derivative of exp, from zero to past the series."""
    x, u = point_and_tangent(geometry)
    u = length * u / norm(geometry, u)[:, None]
    w = geometry.project(x, vectors(3, 6, 4))
    _, v = jax.jvp(lambda u: geometry.exp(x, u), (u,), (w,))
    np.testing.assert_allclose(geometry.exp_inverse_derivative(x, u, v), w, rtol=0, atol=1e-13)


@every_sphere
def test_the_great_circle_closes(geometry):
    """exp(x, v) is the antipode of x at |v| = pi R, and x again at 2 pi R."""
    x, v = point_and_tangent(geometry)
    half = jnp.pi * geometry.radius * v / jnp.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(geometry.exp(x, half), -x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(geometry.exp(x, 2 * half), x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(geometry.distance(x, -x), jnp.pi * geometry.radius, rtol=1e-14)


@every_sphere
@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-9])
def test_distance_keeps_its_accuracy_near_0_and_pi(geometry, angle):
    """Where arccos(<x, y>) would lose half the digits.

    y is rounded to 1 ulp of its length, an absolute error of about 2e-16 in the angle.
    """
    x, v = point_and_tangent(geometry)
    y = geometry.exp(x, angle * geometry.radius * v / jnp.linalg.norm(v, axis=1, keepdims=True))
    near = geometry.distance(x, y) / geometry.radius
    np.testing.assert_allclose(near, angle, rtol=0, atol=1e-15)
    far = geometry.distance(x, -y) / geometry.radius
    np.testing.assert_allclose(np.pi - far, angle, rtol=0, atol=2e-15)


@every_geometry
def test_derivatives_are_finite_at_distance_zero(geometry):
    """distance has derivative 0 at y = x by convention; D_v exp(x, v) is the identity at v = 0."""
    x, v = point_and_tangent(geometry)
    gradient = jax.grad(lambda y: geometry.distance(x, y).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))
    _, derivative = jax.jvp(lambda v: geometry.exp(x, v), (jnp.zeros_like(v),), (v,))
    np.testing.assert_allclose(derivative, v, rtol=0, atol=1e-15)
    gradient = jax.grad(lambda v: geometry.exp(x, v).sum())(jnp.zeros_like(v))
    np.testing.assert_allclose(gradient, jnp.ones_like(v), rtol=0, atol=4e-16)


@every_geometry
def test_the_gradient_of_distance_is_a_unit_vector(geometry):
    """grad_y distance(x, y), projected at y, has length 1 wherever 0 < distance < pi R."""
    x, v = point_and_tangent(geometry)
    y = geometry.exp(x, v)
    gradient = jax.grad(lambda y: geometry.distance(x, y).sum())(y)
    if isinstance(geometry, Ellipsoid):  # of the derivative, by the metric
        gradient = gradient * geometry.gain[None] ** 2
    length = norm(geometry, geometry.project(y, gradient))
    np.testing.assert_allclose(length, 1, rtol=1e-13)


@every_geometry
def test_divergence_correction(geometry):
    """tr(P D(P F) P) = tr(P DF) + correction, for a nonlinear F."""
    matrix = vectors(4, 4, 4)
    force = lambda x: jnp.tanh(matrix @ x)
    field = lambda x: geometry.project(x, force(x))

    def difference(x):
        projection = jax.vmap(lambda e: geometry.project(x, e))(jnp.eye(4)).T
        whole = jnp.trace(projection @ jax.jacfwd(field)(x))
        return whole - jnp.trace(projection @ jax.jacfwd(force)(x))

    x, _ = point_and_tangent(geometry)
    correction = geometry.divergence_correction(x, jax.vmap(force)(x))
    np.testing.assert_allclose(correction, jax.vmap(difference)(x), rtol=0, atol=1e-12)


@every_sphere
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_contains_accepts_ten_roots_of_epsilon(geometry, dtype):
    """Lengths off by a factor 1 + e, |e| <= 10 sqrt(eps): points of another precision pass."""
    x = point_and_tangent(geometry)[0].astype(dtype)
    root = np.sqrt(np.finfo(dtype).eps)
    assert geometry.contains(x).all()
    assert geometry.contains(x.astype(jnp.float32).astype(dtype)).all()
    for factor in (-9, 9):
        assert geometry.contains((1 + factor * root) * x).all()
    for factor in (-11, 11):
        assert not geometry.contains((1 + factor * root) * x).any()


@every_geometry
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_numpy_points_are_checked_in_numpy(geometry, dtype):
    """One operation of JAX would make the answer an array of JAX; NaN is on no curved space."""
    x = np.array(point_and_tangent(geometry)[0].astype(dtype))
    x[0] *= 1.5
    x[1, 0] = np.nan
    there = geometry.contains(x)
    assert type(there) is np.ndarray
    curved = not isinstance(geometry, Euclidean)
    np.testing.assert_array_equal(there, (np.arange(len(x)) > 1) | (not curved))
    np.testing.assert_array_equal(there, geometry.contains(jnp.asarray(x)))


def test_sixteen_bits_hold_spheres_of_any_radius():
    """The squares of these points are beyond float16. In NumPy: not every processor for which XLA
    compiles has instructions for that type."""
    x = np.asarray(300 * Sphere().retract(vectors(0, 6, 4))).astype(np.float16)
    assert Sphere(300.0).contains(x).all() and not Sphere(200.0).contains(x).any()


def test_euclidean_space_contains_everything():
    assert Euclidean().contains(1e3 * vectors(0, 6, 4)).all()


@every_geometry
def test_methods_map_over_leading_axes_and_keep_the_dtype(geometry):
    """A stack (2, 3, d) in float32 gives what each row gives, in float32."""
    x, v = (a.astype(jnp.float32) for a in point_and_tangent(geometry))
    xs, vs = x.reshape(2, 3, 4), v.reshape(2, 3, 4)
    for method in ("project", "exp", "distance", "divergence_correction"):
        fn = getattr(geometry, method)
        stacked, rows = fn(xs, vs), jax.vmap(fn)(x, v)
        assert stacked.dtype == jnp.float32
        # The same operations on the same numbers, which XLA may fuse otherwise: some ulp.
        np.testing.assert_allclose(stacked.reshape(rows.shape), rows, rtol=1e-6, atol=1e-6)
    assert geometry.retract(xs).dtype == jnp.float32
    assert geometry.retract(xs).shape == xs.shape
    assert geometry.contains(xs).shape == (2, 3)


def test_an_ellipsoid_is_the_image_of_layer_normalisation():
    """Tokens of LayerNorm lie on it; its retraction is layer normalisation of (x - b) / g."""
    gain, bias = GAIN, BIAS
    geometry = Ellipsoid(gain, bias)
    normalise = lambda z: (
        2
        * (z - z.mean(1, keepdims=True))
        / jnp.linalg.norm(z - z.mean(1, keepdims=True), axis=1, keepdims=True)
    )
    x = vectors(0, 6, 4)
    tokens = gain[None] * normalise(x) + bias[None]
    assert geometry.contains(tokens).all() and not geometry.contains(x).any()
    np.testing.assert_allclose(geometry.retract(tokens), tokens, rtol=1e-13)
    expected = gain[None] * normalise((x - bias[None]) / gain[None]) + bias[None]
    np.testing.assert_allclose(geometry.retract(x), expected, rtol=1e-13)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones((2, 2)),), "one shape"),
        ((np.ones(3), np.zeros(4)), "one shape"),
        ((np.array([1.0, -1.0, 2.0]),), "must be positive"),
        ((np.ones(2),), "from d = 3 on"),
    ],
)
def test_bad_ellipsoids(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ellipsoid(*arguments)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_must_be_positive(radius):
    with pytest.raises(
        ValueError, match=f"radius of a sphere must be positive and finite, got {radius}"
    ):
        Sphere(radius)
