"""Exact results about attention dynamics, each followed by the library in float64.

beta is written b; rho is a common inner product; I_k is the modified Bessel function; SA is softmax
attention, USA the unnormalised one. V = Q = K = I on the unit sphere unless said.

Solves run at rtol 1e-10 and atol 1e-12. Over some tens of steps the local errors add up to a few
1e-10, which is what `TRUTH` allows for; a closed form that is evaluated and not integrated is held
to rounding. A number of the literature with k decimals is held to half its last one.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp
from scipy.special import iv

import jaxflow as jf

pytestmark = pytest.mark.usefixtures("x64")

TRUTH = 1e-9
CONTROLLER = diffrax.PIDController(rtol=1e-10, atol=1e-12)
STEPS = diffrax.ConstantStepSize()
SA, USA = jf.Softmax(), jf.Unnormalised()
# One evaluation of a field compiles once per structure and shape.
velocity = eqx.filter_jit(lambda field, x, mu: field(0.0, x, mu))


def solve(field, mu, ts, **options):
    """The flow at the times ts. Nothing here is differentiated: ForwardMode compiles fastest."""
    ts = jnp.asarray(ts, float)
    options = {"stepsize_controller": CONTROLLER, "adjoint": diffrax.ForwardMode()} | options
    return jf.flow(field, mu, t1=ts[-1], saveat=diffrax.SaveAt(ts=ts), **options)


def off_diagonal(mu):
    """<x_i, x_j> for i != j, one row a leading index."""
    x = np.asarray(mu.points)
    return (x @ x.swapaxes(-1, -2))[..., ~np.eye(mu.n, dtype=bool)]


def common_inner_product(mu):
    """rho of an equiangular measure, by 1 - rho = |x_1 - x_2|^2 / 2: without cancellation at 1."""
    x = np.asarray(mu.points)
    return 1 - ((x[..., 0, :] - x[..., 1, :]) ** 2).sum(-1) / 2


def gaussian(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def spherical(seed, n, d):
    x = np.asarray(gaussian(seed, n, d))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def nodes_and_weights(count, end):
    """Gauss-Legendre on [0, end]: exact for polynomials of degree 2 count - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return end * (nodes + 1) / 2, end * weights / 2


# ------------------------------------------------------------------ F1, F2: equiangular tokens

N = 32


def equiangular_rate(rho, b, interaction):
    if interaction is SA:
        return 2 * (1 - rho) * ((N - 1) * rho + 1) / (np.exp(b * (1 - rho)) + N - 1)
    return 2 / N * np.exp(b * rho) * (1 - rho) * ((N - 1) * rho + 1)


@pytest.mark.parametrize("interaction", [SA, USA], ids=["SA", "USA"])
@pytest.mark.parametrize("b", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
def test_f1_equiangular_tokens_follow_the_scalar_equation(b, interaction):
    """With <x_i, x_j> = rho for all i != j (arXiv 2312.10794, sec. 6; 2512.01868, sec. 6.1):

    SA:  rho' = 2 (1 - rho) ((n-1) rho + 1) / (e^{b (1 - rho)} + n - 1)
    USA: rho' = (2/n) e^{b rho} (1 - rho) ((n-1) rho + 1)
    """
    ts = [0.5, 1.0, 2.0] if interaction is SA else [0.02, 0.05, 0.2]
    field = jf.SelfAttention(beta=b, interaction=interaction)
    sol = solve(field, jf.measure.simplex(N, N, 0.1), ts)
    exact = solve_ivp(
        lambda _, rho: equiangular_rate(rho, b, interaction),
        (0, ts[-1]), [0.1], method="DOP853", t_eval=ts, rtol=1e-12, atol=1e-13,
    ).y[0]  # fmt: skip
    assert exact[-1] - 0.1 > 0.05
    expected = np.broadcast_to(exact[:, None], (3, N * (N - 1)))
    np.testing.assert_allclose(off_diagonal(sol.measures), expected, rtol=0, atol=TRUTH)


@pytest.mark.parametrize(
    "b, published", [(1.0, [0.151849, 0.589773, 0.998284]), (4.0, [0.035441, 0.118066, 0.952775])]
)
def test_f1_published_inner_products(b, published):
    """SA, n = 32, rho(0) = 0, at t = 1, 2, 5."""
    sol = solve(jf.SelfAttention(beta=b), jf.measure.simplex(N, N, 0.0), [1.0, 2.0, 5.0])
    np.testing.assert_allclose(common_inner_product(sol.measures), published, rtol=0, atol=5e-7)


@pytest.mark.parametrize("b, time", [(0.0, 5.18626), (4.0, 6.95350)])
def test_f1_time_to_cluster(b, time):
    """SA, n = 32 reaches rho = 1 - 1e-3 from 0 at these times, given to 5e-6."""
    mu = jf.measure.simplex(N, N, 0.0)
    rho = common_inner_product(solve(jf.SelfAttention(beta=b), mu, [1.0, 2.0, time]).measures)[-1]
    tolerance = 5e-6 * equiangular_rate(0.999, b, SA) + TRUTH
    np.testing.assert_allclose(rho, 0.999, rtol=0, atol=tolerance)


@pytest.mark.parametrize("b", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("interaction", [SA, USA], ids=["SA", "USA"])
def test_f2_rates_of_collapse(b, interaction):
    """1 - rho ~ C e^{-2 t} (SA, every b) and C e^{-2 e^b t} (USA).

    With u = 1 - rho, the equation of F1 is u' = -2 u (1 - c u + O(u^2)) (SA), c <= 1 + b/n, and
    -2 e^b u (1 - c u + O(u^2)) (USA), c <= 1 + b: the observed rate is below its limit by at most
    2 c u at the start of the interval.
    """
    limit = 2.0 if interaction is SA else 2 * np.exp(b)
    start = 1e-3
    ts = np.array([1.0, 2.0, 3.0]) / limit
    field = jf.SelfAttention(beta=b, interaction=interaction)
    sol = solve(field, jf.measure.simplex(N, N, 1 - start), ts)
    logs = np.log(1 - common_inner_product(sol.measures))
    rates = -np.diff(logs) / np.diff(ts) / limit
    assert (rates <= 1 + TRUTH).all()
    assert (rates >= 1 - 2 * (1 + b) * start).all()
    # The correction itself decays by e from one interval to the next.
    np.testing.assert_allclose((1 - rates[0]) / (1 - rates[1]), np.e, rtol=1e-2)


# ------------------------------------------------------------------ F3, F4: two tokens


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def two_tokens(rho):
    """(1, 0) and (rho, sqrt(1 - rho^2)): the first is exact."""
    rho = jnp.asarray(rho, float)
    return jf.Measure(jnp.stack([jnp.array([1.0, 0.0]), jnp.stack([rho, jnp.sqrt(1 - rho**2)])]))


def test_f3_two_tokens_at_b_0():
    """rho(t) = tanh(t + artanh rho(0))."""
    ts = np.array([0.5, 1.0, 2.0])
    sol = solve(jf.SelfAttention(value=rotation(0.0), beta=0.0), two_tokens(-0.4), ts)
    exact = np.tanh(ts + np.arctanh(-0.4))
    np.testing.assert_allclose(common_inner_product(sol.measures), exact, rtol=0, atol=TRUTH)


@pytest.mark.parametrize("b, published", [(1.0, 1.917028), (4.0, 8.390296), (8.0, 194.134994)])
def test_f3_time_between_two_inner_products(b, published):
    """SA: t = int_{rho0}^{rho1} (e^{b (1-r)} + 1) / (2 (1 - r^2)) dr; here from 0 to 0.9."""
    inverse_rate = lambda r: (np.exp(b * (1 - r)) + 1) / (2 * (1 - r**2))
    time = quad(inverse_rate, 0, 0.9, epsabs=1e-11, epsrel=1e-11)[0]
    np.testing.assert_allclose(time, published, rtol=0, atol=5e-7)
    field = jf.SelfAttention(value=rotation(0.0), beta=b)
    sol = solve(field, two_tokens(0.0), [time / 3, time / 2, time])
    rho = common_inner_product(sol.measures)[-1]
    np.testing.assert_allclose(rho, 0.9, rtol=0, atol=TRUTH)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_f4_gradients_in_closed_form(mode):
    """Two tokens, b = 0, a = artanh rho0, R = rho(T):

    R = tanh(T + a),  dR/drho0 = (1 - R^2) / (1 - rho0^2),
    dR/db = -(1 - R^2)/2 (T - ln cosh(T + a) + ln cosh a).

    Here by the default adjoint and by forward mode; an example runs every adjoint.
    """
    rho0, T = 0.3, 1.0
    reverse = mode == "reverse"
    adjoint = diffrax.RecursiveCheckpointAdjoint() if reverse else diffrax.ForwardMode()

    def R(rho0, b):
        # Ten steps of order 8; what would be thrown shows in the value.
        sol = jf.flow(
            jf.SelfAttention(beta=b), two_tokens(rho0), t1=T, dt0=T / 10, solver=diffrax.Dopri8(),
            stepsize_controller=STEPS, adjoint=adjoint, max_steps=16, throw=False,
        )  # fmt: skip
        x, y = sol.measures.points[-1]
        return x @ y, x @ y  # the value to differentiate, and the value to report

    derivative = jax.grad if reverse else jax.jacfwd
    gradient, value = jax.jit(derivative(R, (0, 1), has_aux=True))(rho0, 0.0)
    a = np.arctanh(rho0)
    exact = np.tanh(T + a)
    by_rho0 = (1 - exact**2) / (1 - rho0**2)
    by_b = -(1 - exact**2) / 2 * (T - np.log(np.cosh(T + a)) + np.log(np.cosh(a)))
    published = np.array([0.8641538088, 0.2782837305, -0.0456390])
    half_decimals = np.array([5e-11, 5e-11, 5e-8])
    assert (np.abs(np.array([exact, by_rho0, by_b]) - published) <= half_decimals).all()
    np.testing.assert_allclose([value, *gradient], [exact, by_rho0, by_b], rtol=0, atol=TRUTH)


# ------------------------------------------------------------------ F5, F6: the circle


def test_f5_kuramoto_order_parameter():
    """b = 0, d = 2, from the Poisson kernel: r(t) = r0 e^{t/2} / sqrt(1 - r0^2 + r0^2 e^t).

    200 quantile particles are within 2e-11 of it: their own error, r^200 < 2e-16, is nothing, and
    what is left is that of the solve.
    """
    ts, r0 = np.array([1.0, 2.0, 4.0]), 0.2
    # Steps of order 8 that end at the saved times: no interpolation.
    sol = solve(
        jf.SelfAttention(beta=0.0), jf.measure.kuramoto(200, r0), ts,
        dt0=0.25, solver=diffrax.Dopri8(), stepsize_controller=STEPS,
    )  # fmt: skip
    exact = r0 * np.exp(ts / 2) / np.sqrt(1 - r0**2 + r0**2 * np.exp(ts))
    np.testing.assert_allclose(exact, [0.318965, 0.485183, 0.833456], rtol=0, atol=5e-7)
    r = jnp.linalg.norm(sol.measures.mean, axis=-1)
    np.testing.assert_allclose(r, exact, rtol=0, atol=2e-11)


@eqx.filter_jit
def growth_rates(field, modes):
    """<cos k a, D theta'[cos k a]> / <cos k a, cos k a> at the uniform measure on S^1, per k.

    256 tokens: the aliases of mode k are at 256 - k, where I_{256-k}(b) is below rounding.
    """
    angles = 2 * jnp.pi * jnp.arange(256, dtype=float) / 256

    def angular_velocity(angles):
        mu = jf.measure.from_angles(angles)
        x, v = mu.points, field(0.0, mu.points, mu)
        return x[:, 0] * v[:, 1] - x[:, 1] * v[:, 0]

    def rate(k):
        mode = jnp.cos(k * angles)
        growth = jax.jvp(angular_velocity, (angles,), (mode,))[1]
        rate = (mode @ growth) / (mode @ mode)
        return rate, jnp.abs(growth - rate * mode).max()

    return jax.vmap(rate)(modes)


@pytest.mark.parametrize("interaction", [SA, USA], ids=["SA", "USA"])
def test_f6_growth_of_fourier_modes(interaction):
    """Mode k of the uniform measure grows at k^2 I_k(b) / b (USA), divided by I_0(b) (SA).

    b = 5, k = 3: 18.596070 and .68267833. The fastest mode is 3 at b = 5 and 4 at b = 7.
    """
    k = np.arange(1.0, 11.0)
    for b, fastest in ((5.0, 3), (7.0, 4)):
        field = jf.SelfAttention(beta=b, interaction=interaction)
        rates, residual = growth_rates(field, jnp.asarray(k))
        exact = k**2 * iv(k, b) / b / (1 if interaction is USA else iv(0, b))
        # Sums of 256 terms of size e^b at most (USA), in float64.
        scale = np.exp(b) if interaction is USA else 1
        np.testing.assert_allclose(rates, exact, rtol=0, atol=1e-13 * scale)
        assert residual.max() <= 1e-12 * scale  # cos(k a) is an eigenvector
        assert k[np.argmax(rates)] == fastest == round(np.sqrt(2 * b))
        if b == 5.0:
            published, decimals = (18.596070, 6) if interaction is USA else (0.68267833, 8)
            np.testing.assert_allclose(rates[2], published, rtol=0, atol=0.5 * 10.0**-decimals)


# ------------------------------------------------------------------ F7, F8: energy and density


def mean_square_speed(interaction, b, mu):
    """mean_i c_i |x_i'|^2: c_i = 1 (USA), Z_i = mean_k e^{b <x_i, x_k>} (SA)."""
    v = jf.SelfAttention(beta=b, interaction=interaction)(0.0, mu.points, mu)
    z = jnp.exp(b * jf.observables.inner_products(mu)).mean(axis=1)
    return ((v**2).sum(axis=1) * (z if interaction is SA else 1.0)).mean()


@pytest.mark.parametrize("interaction", [SA, USA], ids=["SA", "USA"])
def test_f7_energy_grows_at_the_mean_square_speed(interaction):
    """E = (1/2b) mean_ij e^{b <x_i, x_j>}: dE/dt = mean |x_i'|^2 (USA), mean Z_i |x_i'|^2 (SA)."""
    b = 2.0
    mu = jf.Measure(spherical(1, 16, 3))

    @jax.jit
    def both(x):
        mu = jf.Measure(x)
        v = jf.SelfAttention(beta=b, interaction=interaction)(0.0, x, mu)
        energy = lambda x: jf.observables.interaction_energy(jf.Measure(x), b)
        return jax.jvp(energy, (x,), (v,))[1], mean_square_speed(interaction, b, mu)

    growth, speed = both(mu.points)
    # Sums of 256 terms up to e^b in float64.
    np.testing.assert_allclose(growth, speed, rtol=1e-13)


def test_f7_energy_balance_along_the_flow():
    """USA: int_0^T mean |x_i'|^2 dt = E(T) - E(0), by 24 Gauss-Legendre nodes."""
    b, T = 2.0, 1.0
    mu = jf.Measure(spherical(1, 16, 3))
    nodes, weights = nodes_and_weights(24, T)
    observe = {
        "energy": jf.observables.InteractionEnergy(beta=b),
        "speed": lambda t, mu: mean_square_speed(USA, b, mu),
    }
    field = jf.SelfAttention(beta=b, interaction=USA)
    observed = solve(field, mu, [0.0, *nodes, T], observe=observe).observed
    gain = observed["energy"][-1] - observed["energy"][0]
    assert gain > 0.05
    np.testing.assert_allclose(weights @ observed["speed"][1:-1], gain, rtol=0, atol=TRUTH)


def test_f8_divergence_at_a_fixed_measure():
    """D F(x) = b V Cov_{mu_x}(y) K^T Q; on the sphere div = tr(P_x DF) - (d-1) <x, F>."""
    d, b = 3, 1.7
    Q, K, V = gaussian(1, 2, d), gaussian(2, 2, d), gaussian(3, d, d)
    mu = jf.Measure(gaussian(4, 9, d), gaussian(5, 9))
    x = spherical(6, 5, d)
    on_sphere = jf.SelfAttention(Q, K, V, beta=b)
    in_space = jf.SelfAttention(Q, K, V, beta=b, geometry=jf.Euclidean())

    def formula(x):
        p = jax.nn.softmax(b * (mu.points @ K.T @ Q @ x) + mu.log_weights)
        m = p @ mu.points
        centred = mu.points - m[None]
        covariance = centred.T @ (p[:, None] * centred)
        DF, F = b * V @ covariance @ K.T @ Q, V @ m
        P = jnp.eye(d) - jnp.outer(x, x)
        return DF, jnp.trace(DF), jnp.trace(P @ DF) - (d - 1) * (x @ F)

    derivative, trace, sphere_trace = jax.jit(jax.vmap(formula))(x)
    one = lambda x: in_space(0.0, x[None], mu)[0]
    # Rounding of sums of 9 terms of size 10.
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.jacfwd(one)))(x), derivative, rtol=0, atol=1e-12
    )
    divergence = eqx.filter_jit(jf.divergence)
    np.testing.assert_allclose(divergence(in_space, 0.0, x, mu), trace, rtol=0, atol=1e-12)
    np.testing.assert_allclose(divergence(on_sphere, 0.0, x, mu), sphere_trace, rtol=0, atol=1e-12)


def test_f8_density_along_the_flow():
    """d/dt log rho_t(x_t) = -div: the flow map multiplies areas by e^{int div dt}.

    Tokens without mass are carried along; det of the derivative of x_T in x_0 between tangent
    planes, against the integral of the divergence by 24 Gauss-Legendre nodes.
    """
    d, T, massive, probes = 3, 1.0, 8, 4
    field = jf.SelfAttention(gaussian(1, 2, d), gaussian(2, 2, d), gaussian(3, d, d), beta=0.8)
    x0 = spherical(4, massive + probes, d)
    log_weights = jnp.where(jnp.arange(massive + probes) < massive, 0.0, -jnp.inf)
    nodes, weights = nodes_and_weights(24, T)
    observe = {"divergence": lambda t, mu: jf.divergence(field, t, mu.points, mu)}

    def end(x):
        sol = solve(field, jf.Measure(x, log_weights), [*nodes, T], observe=observe)
        return sol.measures.points[-1], sol.observed["divergence"][:-1]

    def tangent_planes(x):
        """Orthonormal bases of the planes orthogonal to x, shape (n, 2, d)."""
        return np.stack([np.linalg.svd(row[None])[2][1:] for row in np.asarray(x)])

    moved = (jnp.arange(massive + probes) >= massive)[:, None]

    @jax.jit
    def run(x0, directions):
        push = lambda v: jax.jvp(end, (x0,), (jnp.where(moved, v, 0.0),), has_aux=True)
        x, pushed, divergences = jax.vmap(push, out_axes=(None, 0, None))(directions)
        return x, pushed, divergences

    before = tangent_planes(x0)
    x, pushed, divergences = run(x0, jnp.asarray(before.swapaxes(0, 1)))
    jacobian = np.einsum("nid,jnd->nij", tangent_planes(x), pushed)[massive:]
    # The bases are oriented at random: areas are absolute values.
    logs = np.log(np.abs(np.linalg.det(jacobian)))
    integral = (weights @ np.asarray(divergences))[massive:]
    assert np.abs(integral).min() > 0.1
    np.testing.assert_allclose(logs, integral, rtol=0, atol=10 * TRUTH)


# ------------------------------------------------------------------ F9, F10, F11: symmetry


def test_f9_norms_off_the_sphere():
    """d|x|^2/dt = 2 <x, F> (1 - |x|^2), for the field as a function on R^d."""
    x = jnp.linspace(0.5, 1.5, 9)[:, None] * spherical(1, 9, 3)
    mu = jf.Measure(x)
    V = gaussian(2, 3, 3)
    X = velocity(jf.SelfAttention(value=V, beta=2.0), x, mu)
    F = velocity(jf.SelfAttention(value=V, beta=2.0, geometry=jf.Euclidean()), x, mu)
    growth = 2 * (x * F).sum(axis=1) * (1 - (x**2).sum(axis=1))
    np.testing.assert_allclose(2 * (x * X).sum(axis=1), growth, rtol=0, atol=1e-13)


def test_f9_repulsion_at_the_regular_simplex():
    """V = -I, n = 4, b = 1: <x, F> = -(e - e^{-1/3}) / (e + 3 e^{-1/3}) = -.411216.

    It is negative: the sphere repels, and only retraction keeps the tokens there.
    """
    mu = jf.measure.simplex(4, 3, -1 / 3)
    F = velocity(jf.SelfAttention(value=-jnp.eye(3), geometry=jf.Euclidean()), mu.points, mu)
    exact = -(np.e - np.exp(-1 / 3)) / (np.e + 3 * np.exp(-1 / 3))
    np.testing.assert_allclose(exact, -0.411216, rtol=0, atol=5e-7)
    np.testing.assert_allclose((mu.points * F).sum(axis=1), exact, rtol=1e-13)


def test_f10_repulsive_tokens_end_at_the_regular_simplex():
    """V = -I, n = d + 1: all <x_i, x_j> tend to -1/d, and the tokens stay on the sphere."""
    d = 3
    mu = jf.Measure(spherical(3, d + 1, d))
    # The last mode decays like e^{-0.39 t}: to 1e-17 at t = 100.
    sol = solve(jf.SelfAttention(value=-jnp.eye(d)), mu, [0.0, 100.0])
    np.testing.assert_allclose(off_diagonal(sol.measures[-1]), -1 / d, rtol=0, atol=TRUTH)
    # Each saved point is retracted: |x| is 1 to rounding.
    lengths = jnp.linalg.norm(sol.measures.points, axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=4e-16)


def test_f11_the_flow_commutes_with_rotations_and_permutations():
    """mu(t) from (R x_sigma(i)) is R x_sigma(i)(t), for R in O(d)."""
    mu = jf.Measure(spherical(1, N, N))
    R = np.linalg.qr(gaussian(2, N, N))[0]
    order = np.random.default_rng(0).permutation(N)
    field, ts = jf.SelfAttention(beta=4.0), [1.0, 2.0, 5.0]
    move = lambda x: np.asarray(x)[..., order, :] @ R.T
    moved = solve(field, jf.Measure(move(mu.points)), ts).measures.points
    expected = move(solve(field, mu, ts).measures.points)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=TRUTH)


def test_f11_a_rotating_value_turns_the_cluster():
    """SA with V = rotation by phi, d = 2: once clustered, the angle grows at sin(phi)."""
    phi = 0.5
    # Their angle decays like e^{-cos(phi) t}: at t = 30 it is below 1e-11.
    ts = np.array([30.0, 31.0, 33.0])
    x = np.asarray(
        solve(jf.SelfAttention(value=rotation(phi)), two_tokens(0.5), ts).measures.points
    )
    angles = np.unwrap(np.arctan2(x[..., 1], x[..., 0]), axis=0)
    np.testing.assert_allclose(angles[:, 0], angles[:, 1], rtol=0, atol=TRUTH)
    turned = np.diff(angles[:, 0])
    np.testing.assert_allclose(turned, np.sin(phi) * np.diff(ts), rtol=0, atol=TRUTH)


# ------------------------------------------------------------------ F12: Gaussian measures


def gaussian_measure(mean, covariance, nodes):
    """N(mean, covariance) on R^2 by Gauss-Hermite nodes, exact up to degree 2 nodes - 1.

    An affine image of the nodes is the rule of the affine image of the Gaussian.
    """
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2)
    log_weights = np.log(np.outer(w, w)).reshape(-1)
    points = mean[None] + grid @ np.linalg.cholesky(covariance).T
    return jf.Measure(jnp.asarray(points), jnp.asarray(log_weights))


B = 0.3
QUERY, KEY, VALUE = (np.asarray(m) for m in ([[0.9, 0.2], [-0.1, 1.1]],
                                             [[1.0, -0.3], [0.2, 0.8]],
                                             [[0.7, 0.5], [-0.4, 0.9]]))  # fmt: skip
A = B * KEY.T @ QUERY
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.8, 0.2], [0.2, 0.5]])


def test_f12_the_field_of_a_gaussian_is_affine():
    """X(x) = V (m + S A x), A = b K^T Q; m' = V (I + S A) m, S' = V S A S + S A^T S V^T.

    (arXiv 2501.18322.) 24 nodes a side integrate e^{<a, z>} to rounding for |a| <= 3: the tilt of
    the query furthest out has |a| = |S^{1/2} A x| < 3.
    """
    mu = gaussian_measure(MEAN, COVARIANCE, 24)
    field = jf.SelfAttention(QUERY, KEY, VALUE, beta=B, geometry=jf.Euclidean())

    @jax.jit
    def motion(x):
        v = field(0.0, x, mu)
        moments = lambda x: ((nu := jf.Measure(x, mu.log_weights)).mean, nu.covariance)
        return v, *jax.jvp(moments, (x,), (v,))[1]

    v, mean_rate, covariance_rate = motion(mu.points)
    tilt = mu.points @ (np.linalg.cholesky(COVARIANCE).T @ A).T
    assert jnp.linalg.norm(tilt, axis=1).max() < 3
    exact = (MEAN[None] + mu.points @ (COVARIANCE @ A).T) @ VALUE.T
    np.testing.assert_allclose(v, exact, rtol=0, atol=1e-11)
    exact = VALUE @ (np.eye(2) + COVARIANCE @ A) @ MEAN
    np.testing.assert_allclose(mean_rate, exact, rtol=0, atol=1e-13)
    half = VALUE @ COVARIANCE @ A @ COVARIANCE
    np.testing.assert_allclose(covariance_rate, half + half.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("v", [1.0, -1.0])
def test_f12_covariance_of_a_gaussian_along_the_flow(v):
    """V = v I: S(t) = (S0^{-1} - v t (A + A^T))^{-1}, which blows up at a finite time for v > 0.

    Followed to half the time of blow-up, where one variance has doubled.
    """
    inverse = np.linalg.inv(COVARIANCE)
    blow_up = 1 / np.linalg.eigvals(COVARIANCE @ (A + A.T)).real.max()
    ts = blow_up * np.array([0.1, 0.25, 0.5])
    field = jf.SelfAttention(QUERY, KEY, v * np.eye(2), beta=B, geometry=jf.Euclidean())
    sol = solve(field, gaussian_measure(MEAN, COVARIANCE, 24), ts)
    exact = np.stack([np.linalg.inv(inverse - v * t * (A + A.T)) for t in ts])
    np.testing.assert_allclose(sol.measures.covariance, exact, rtol=0, atol=TRUTH)
    growth = np.linalg.eigvals(np.linalg.solve(COVARIANCE, sol.measures.covariance[-1])).real
    extreme = growth.max() if v > 0 else growth.min()
    np.testing.assert_allclose(extreme, 1 / (1 - v / 2), rtol=10 * TRUTH)


# ------------------------------------------------------------------ F13, F14: attention in R^d


def test_f13_sinkhorn_attention_moves_the_mean_linearly():
    """m' = V m exactly, since columns sum to 1; softmax attention does not."""
    d = 3
    V = gaussian(1, d, d)
    for log_weights in (jnp.zeros(9), gaussian(2, 9)):
        mu = jf.Measure(gaussian(3, 9, d), log_weights)
        rates = {}
        for name, interaction in (("sinkhorn", jf.Sinkhorn()), ("softmax", SA)):
            field = jf.SelfAttention(
                value=V, beta=0.5, interaction=interaction, geometry=jf.Euclidean()
            )
            rates[name] = jf.Measure(velocity(field, mu.points, mu), log_weights).mean
        expected = V @ mu.mean
        # The default tolerance of the potentials is 64 eps = 1.4e-14 a sweep, and sweeps contract.
        np.testing.assert_allclose(rates["sinkhorn"], expected, rtol=0, atol=1e-12)
        assert jnp.abs(rates["softmax"] - expected).max() > 0.1


def test_f14_convex_hulls_are_nested():
    """V = I in R^d: the hull of z = e^{-t} x at a later time lies in the hull at an earlier one.

    The support functions h(u) = max_i <u, z_i> decrease in t for every direction u.
    """
    ts = np.linspace(0.0, 3.0, 7)
    mu = jf.Measure(gaussian(1, 16, 2))
    sol = solve(jf.SelfAttention(geometry=jf.Euclidean()), mu, ts)
    z = np.exp(-ts)[:, None, None] * sol.measures.points
    directions = jf.measure.from_angles(np.linspace(0, 2 * np.pi, 64)).points
    support = np.einsum("tnd,ud->tun", z, directions).max(axis=-1)
    assert np.diff(support, axis=0).max() <= TRUTH
    assert (support[0] - support[-1]).max() > 0.1  # the hull does shrink
    assert (np.diff(jf.observables.hull_area(jf.Measure(z))) < 0).all()


def test_f14_attention_becomes_boolean_of_rank_two():
    """d = 1, V > 0, QK > 0: the attention matrix tends to a Boolean one of rank <= 2.

    (arXiv 2305.05465.) The line is the first axis of R^2, which V = I keeps. Scores grow like
    e^{2t}, so that e^{-score} is below rounding at t = 6.
    """
    field = jf.SelfAttention(geometry=jf.Euclidean())
    mu = jf.Measure(gaussian(2, 16, 2) * np.array([[1.0, 0.0]]))
    measures = solve(field, mu, np.linspace(0.0, 6.0, 7)).measures
    np.testing.assert_array_equal(measures.points[..., 1], 0)
    matrix = eqx.filter_jit(jf.observables.attention_matrix)
    start, end = (np.asarray(matrix(field, measures[i])) for i in (0, -1))
    assert np.abs(start - np.round(start)).max() > 0.3
    np.testing.assert_allclose(end, np.round(end), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(np.round(end).sum(axis=1), 1)
    assert np.linalg.matrix_rank(np.round(end)) == 2
    rank = jf.observables.AttentionRank(field, tolerance=1e-4)
    assert rank(0.0, measures[0]) > 4 and rank(6.0, measures[-1]) == 2


# ------------------------------------------------------------------ F15, F16: leaders


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_f15_hardmax_followers_contract_towards_their_leader(a):
    """x <- x + a/(1+a) mean_{C_i}(x_j - x_i): leaders stay, x - leader shrinks by 1/(1+a) a step.

    (arXiv 2407.01602.) Euler with dt = 1 on a/(1+a) (hardmax attention - x) is that map. Three
    leaders on a circle; each follower is led by the one that it points to, all the way.
    """
    leaders = 3 * jf.measure.circle(3).points
    points = jnp.concatenate([leaders, gaussian(1, 9, 2) / 4])
    leader = np.asarray(points @ leaders.T).argmax(axis=1)
    assert set(leader[3:]) == {0, 1, 2}
    step = (
        a
        / (1 + a)
        * (
            jf.SelfAttention(interaction=jf.Hardmax(), geometry=jf.Euclidean())
            + jf.LinearDrift(-1.0)
        )
    )
    ts = np.arange(1.0, 6.0)
    sol = solve(
        step, jf.Measure(points), ts,
        dt0=1.0, solver=diffrax.Euler(), stepsize_controller=STEPS,
    )  # fmt: skip
    x = np.asarray(sol.measures.points)
    # Five steps, each rounded once or twice at size 3.
    np.testing.assert_allclose(x[:, :3], np.broadcast_to(leaders, (5, 3, 2)), rtol=0, atol=1e-14)
    led = np.asarray(leaders)[leader]
    gaps = (1 + a) ** -ts[:, None, None] * (np.asarray(points) - led)
    np.testing.assert_allclose(x - led[None], gaps, rtol=0, atol=1e-14)


def causal_tokens(rho):
    """16 tokens on S^2, the first two (1, 0, 0) and at inner product rho with it."""
    tail = spherical(1, 14, 3)
    head = jnp.pad(two_tokens(rho).points, ((0, 0), (0, 1)))
    return jf.Measure(jnp.concatenate([head, tail]))


def test_f3_two_causal_tokens_at_b_0():
    """rho(t) = tanh(t/2 + artanh rho(0)), and x_1 stays exactly.

    The tokens that come later, here 14, have no influence.
    """
    ts = np.array([0.5, 1.0, 2.0])
    sol = solve(jf.SelfAttention(beta=0.0, causal=True), causal_tokens(-0.4), ts)
    exact = np.tanh(ts / 2 + np.arctanh(-0.4))
    np.testing.assert_allclose(common_inner_product(sol.measures), exact, rtol=0, atol=TRUTH)
    np.testing.assert_array_equal(sol.measures.points[:, 0], np.tile([1.0, 0.0, 0.0], (3, 1)))


@pytest.mark.parametrize("b", [0.0, 1.0, 4.0])
def test_f16_causal_tokens_follow_the_first(b):
    """V = I: every x_k -> x_1(0) (arXiv 2411.04990).

    Near x_1, token k is pulled back at the rate 1 - 1/k >= 1/2, so that e^{-30} = 1e-13 of the
    distance is left 60 time units after the cluster has formed; at b = 4 that takes 74.
    """
    mu = causal_tokens(-0.4)
    points = solve(jf.SelfAttention(beta=b, causal=True), mu, [1.0, 2.0, 150.0]).measures.points
    expected = np.tile([1.0, 0.0, 0.0], (16, 1))
    assert np.abs(points[0] - expected).max() > 1
    np.testing.assert_allclose(points[-1], expected, rtol=0, atol=TRUTH)
