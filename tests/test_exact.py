"""More exact results about attention dynamics, each with its derivation, in float64.

b is beta, w the weights, M = sum_j w_j y_j y_j^T the second moment, rho an inner product of two
tokens; SA is softmax attention, USA the unnormalised one, with V = Q = K = I on the unit sphere
unless said. Solves run at rtol 1e-11 and atol 1e-13: `TRUTH`, for some tens of steps and tokens of
size 5. Flows of one interaction share a program: tokens that a law does not need have no mass.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import exp1, expi, iv, lambertw

import jaxflow as jf
from jaxflow.fields import AbstractInteraction

pytestmark = pytest.mark.usefixtures("x64")

TRUTH = 1e-9
ROUNDING = 1e-12
CONTROLLER = diffrax.PIDController(rtol=1e-11, atol=1e-13)
SA, USA = jf.Softmax(), jf.Unnormalised()
FLAT = jf.Euclidean()


def solve(field, mu, ts):
    """The points at three times."""
    return np.asarray(
        jf.flow(
            field, mu, t1=ts[-1], saveat=diffrax.SaveAt(ts=jnp.asarray(ts, float)),
            stepsize_controller=CONTROLLER, adjoint=diffrax.ForwardMode(),
        ).measures.points
    )  # fmt: skip


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def weighted(points, weights):
    """Five tokens: those given, and tokens without mass in between."""
    points, weights = np.asarray(points, float), np.asarray(weights, float)
    points = np.concatenate([points, np.repeat(points[:1], 5 - len(points), axis=0)])
    logs = np.append(np.log(weights), np.full(5 - len(weights), -np.inf))
    return jf.Measure(jnp.asarray(points), jnp.asarray(logs))


def circle(angles, weights):
    angles = np.asarray(angles, float)
    return weighted(np.stack([np.cos(angles), np.sin(angles)], axis=1), weights)


def angles(points):
    """Of points `(t, n, 2)` that turn by less than half a turn from one time to the next."""
    return np.unwrap(np.arctan2(points[..., 1], points[..., 0]), axis=0)


def attention(b, interaction: AbstractInteraction = SA, value=None, geometry: Any = jf.Sphere()):
    return jf.SelfAttention(value=value, beta=b, interaction=interaction, geometry=geometry)


# ------------------------------------------------------------------ rates at equilibria

POLE = np.array([[0.0, 0.0, 1.0]])


def test_rates_at_consensus():
    """x_i = e + v_i with V e = l e: weights change by O(v^2), whatever Q and K are, so
    v_i' = P V mean(v) - l v_i. Differences decay at l; the mean v moves as P V - l:
    consensus at e is stable if and only if l is the largest eigenvalue of V."""
    V = np.diag([0.5, -0.3, 1.2])
    field = jf.SelfAttention(normal(1, 2, 3), normal(2, 2, 3), V, beta=1.7)
    found = jf.jacobian_spectrum(field, jf.Measure(np.repeat(POLE, 4, axis=0)))
    exact = [0.5 - 1.2, *[-1.2] * 6, -0.3 - 1.2]
    np.testing.assert_allclose(found, exact, rtol=0, atol=ROUNDING)


def test_rates_at_consensus_of_each_interaction():
    """A law of density phi(s): sum_j w_j phi(s_ij) P x_j = phi(b) (mean(v) - v_i) + O(v^2), since
    <x_i, x_j> = 1 - O(v^2). phi(b) is 1 (SA, L2, Sinkhorn: normalised), e^b (USA), b (linear),
    1 / (1 + e^{-b}) (sigmoid); 1 - rho then falls at twice that rate."""
    b, x = 0.7, jnp.asarray(np.repeat(POLE, 4, axis=0))
    v = jnp.asarray(np.pad(normal(1, 4, 2), ((0, 0), (0, 1))))
    kinds = [SA, jf.L2(), jf.Sinkhorn(3), USA, jf.Linear(), jf.Sigmoid()]
    rates = [1.0, 1.0, 1.0, np.exp(b), b, 1 / (1 + np.exp(-b))]

    @jax.jit
    def pushed(x, v):
        of = lambda kind: lambda x: attention(b, kind)(0.0, x, jf.Measure(x))
        return [jax.jvp(of(kind), (x,), (v,))[1] for kind in kinds]

    for found, rate in zip(pushed(x, v), rates, strict=True):
        np.testing.assert_allclose(found, rate * (v.mean(axis=0)[None] - v), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("slope", [0.0, 0.4])
def test_rates_at_consensus_of_causal_attention(slope):
    """v_i' = sum_{j <= i} a_ij v_j - v_i is triangular, with a_ii = 1 / sum_{m < i} e^{-slope m}:
    the i-th token comes in at the rate 1 - a_ii, without a bias 1 - 1/i. The second is the
    slowest."""
    field = jf.SelfAttention(interaction=jf.ALiBi(slope), causal=True, beta=2.0)
    found = jf.jacobian_spectrum(field, jf.Measure(np.repeat(POLE, 4, axis=0)))
    own = 1 / np.cumsum(np.exp(-slope * np.arange(4)))
    np.testing.assert_allclose(found, np.repeat(own - 1, 2), rtol=0, atol=1e-7)  # not normal
    if slope == 0:
        np.testing.assert_allclose(own, 1 / np.arange(1, 5))


def test_rates_of_two_opposite_clusters():
    """Masses p at e and q at -e, a the weights of clusters: v_i' = sum_j a_ij v_j - m_i v_i with
    m_i = <x_i, F_i>, a_++ - a_+- or a_-- - a_-+. Means u, v of the two: u' = a_+- (u + v) and
    v' = a_-+ (u + v), so the pair turns at no cost and breaks at a_+- + a_-+; the rest is -m_i."""
    b, w = 0.8, np.array([0.1, 0.2, 0.3, 0.4])
    mu = jf.Measure(POLE * np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.log(w))
    p, q = w[:2].sum(), w[2:].sum()
    plus = np.array([p * np.exp(b), q * np.exp(-b)])
    minus = np.array([q * np.exp(b), p * np.exp(-b)])
    (own, other), (own_, other_) = plus / plus.sum(), minus / minus.sum()
    exact = np.sort([other + other_, 0, other - own, other_ - own_])[::-1]
    found = jf.jacobian_spectrum(attention(b), mu)
    np.testing.assert_allclose(found, np.repeat(exact, 2), rtol=0, atol=ROUNDING)


def test_rates_of_a_regular_polygon():
    """Angles e_j off a regular n-gon: terms in sum_j a_j sin(d_j) vanish by symmetry, and
    e_i' = sum_j a_j (cos d_j - b sin^2 d_j) (e_{i+j} - e_i), d_j = 2 pi j / n, a_j the weights.
    A circulant matrix: rates sum_j a_j (cos d_j - b sin^2 d_j) (cos(k d_j) - 1), k = 0, ..., n-1,
    and their negatives for V = -I, under which polygons are stable."""
    b, n = 1.3, 6
    d = 2 * np.pi * np.arange(n) / n
    a = np.exp(b * np.cos(d)) / np.exp(b * np.cos(d)).sum()
    rates = [a * (np.cos(d) - b * np.sin(d) ** 2) @ (np.cos(k * d) - 1) for k in range(n)]
    for sign in (1, -1):
        field = attention(b, value=sign * np.eye(2))
        found = jf.jacobian_spectrum(field, jf.measure.circle(n))
        np.testing.assert_allclose(
            found[::sign], np.sort(rates)[::-1] * sign, rtol=0, atol=ROUNDING
        )


def test_linear_attention_moves_one_degree_alone():
    """X[mu](x) = b P M x sees mu by M, so the modes of degree 2 alone grow. Of h = P_2(<e, y>),
    int y y^T h = 2 / (d (d+2)) (e e^T - (I - e e^T) / (d-1)), and -div b P (that) x = l h with
    l = 2 b / (d + 2)."""
    rates = jf.growth_rates(attention(1.5, jf.Linear()), [1, 2, 3], 3, nodes=8)
    np.testing.assert_allclose(rates, [0, 2 * 1.5 / 5, 0], rtol=0, atol=ROUNDING)


def test_the_critical_temperature_of_softmax_attention():
    """Noise takes k (k+d-2) / kappa off the rate k (k+d-2) / b I_{k+d/2-1}(b) / I_{d/2-1}(b). The
    ratio falls with k, so the first mode is the last to be stable, and the uniform law is up to
    kappa_c = b I_{d/2-1}(b) / I_{d/2}(b), which is d + O(b^2)."""
    b, d = 1.0, 3
    critical = b * iv(d / 2 - 1, b) / iv(d / 2, b)
    rates = jf.growth_rates(attention(b), [1, 2, 3], d, kappa=critical, nodes=24)
    np.testing.assert_allclose(rates[0], 0, atol=ROUNDING)
    assert (rates[1:] < 0).all() and abs(critical - d) < b**2 / 4


# ------------------------------------------------------------------ linear attention


@pytest.mark.parametrize("v", [1.0, -1.0])
def test_linear_attention_in_space(v):
    """V = v I: x' = v b M x, so M' = 2 v b M^2 and M = (M_0^{-1} - 2 v b t)^{-1} for any law, and
    with int v b M = -log(I - 2 v b t M_0) / 2, x(t) = (I - 2 v b t M_0)^{-1/2} x(0).
    It blows up at t = 1 / (2 b |M_0|) for v = 1; for v = -1 the moment decays like 1 / (2 b t)."""
    x, w, b = normal(3, 5, 2), np.array([0.1, 0.15, 0.2, 0.25, 0.3]), 0.7
    M, turn = np.linalg.eigh(x.T @ (w[:, None] * x))
    ts = np.array([0.2, 0.5, 0.8]) / (2 * b * M[-1])
    found = solve(attention(b, jf.Linear(), v * np.eye(2), FLAT), weighted(x, w), ts)
    stretched = (x @ turn) / np.sqrt(1 - 2 * v * b * ts[:, None, None] * M)
    np.testing.assert_allclose(found, stretched @ turn.T, rtol=0, atol=TRUTH)


def test_the_entropy_that_linear_attention_makes():
    """div X = b tr M everywhere, so log rho falls along the flow by int b tr M dt, which is
    -log det(I - 2 b t M_0) / 2, and the entropy -int rho log rho grows by as much."""
    x, b = normal(4, 5, 2), 0.5
    M = x.T @ x / 5
    entropy = lambda t: -jnp.linalg.slogdet(jnp.eye(2) - 2 * b * t * M)[1] / 2
    t = 0.6 / (2 * b * np.linalg.eigvalsh(M)[-1])
    values, turn = np.linalg.eigh(M)
    mu = jf.Measure(jnp.asarray((x @ turn) / np.sqrt(1 - 2 * b * t * values)))  # at t, turned

    @jax.jit
    def rates(mu):
        field = attention(b, jf.Linear(), geometry=FLAT)
        return jf.divergence(field, 0.0, mu.points[:2] + 1, mu), jax.grad(entropy)(t)

    found, exact = rates(mu)
    np.testing.assert_allclose(found, exact, rtol=ROUNDING)


def test_the_cross_ratio_that_linear_attention_keeps():
    """On the circle x' = P (b M) x: x = G x(0) / |G x(0)| with G' = b M G, one matrix for all.
    Lines through 0 move by a projective map, and four of them keep the cross ratio of their
    slopes, sin(13) sin(24) / (sin(14) sin(23)) with (ij) the angle between two."""
    a, w = np.array([0.0, 0.7, 1.1, 2.0, 2.9]), [0.1, 0.15, 0.2, 0.25, 0.3]
    moved = angles(solve(attention(2.0, jf.Linear()), circle(a, w), [0.5, 1.0, 2.0]))
    sine = lambda a, i, j: np.sin(a[..., i] - a[..., j])
    ratio = lambda a: sine(a, 0, 2) * sine(a, 1, 3) / (sine(a, 0, 3) * sine(a, 1, 2))
    np.testing.assert_allclose(ratio(moved), ratio(a), rtol=10 * TRUTH)
    assert np.abs(moved[-1] - a).max() > 0.3


def test_two_tokens_of_linear_attention():
    """rho' = b rho (1 - rho^2), so rho / sqrt(1 - rho^2) grows like e^{bt}: acute pairs meet, right
    angles stay, and obtuse pairs end opposite to each other."""
    ts, b = np.array([0.5, 1.0, 2.0]), 1.5
    for angle in (1.2, np.pi / 2, 2.0):
        x = solve(attention(b, jf.Linear()), circle([0.0, angle], [0.5, 0.5]), ts)
        rho = (x[:, 0] * x[:, 1]).sum(axis=1)
        odds = np.exp(b * ts) / np.tan(angle)
        np.testing.assert_allclose(rho, odds / np.sqrt(1 + odds**2), rtol=0, atol=TRUTH)


# ------------------------------------------------------------------ unnormalised attention


def test_the_time_for_two_tokens_to_meet():
    """USA: rho' = e^{b rho} (1 - rho^2), and 1 / (1 - r^2) = 1/2 (1 / (1 - r) + 1 / (1 + r)), so
    t = G(rho(t)) - G(rho_0) with G' = e^{-b r} / (1 - r^2), in exponential integrals
    G(r) = -(e^b E_1(b (1 + r)) + e^{-b} Ei(b (1 - r))) / 2."""
    b, rho = 1.2, np.array([-0.5, 0.0, 0.5, 0.9])
    G = -(np.exp(b) * exp1(b * (1 + rho)) + np.exp(-b) * expi(b * (1 - rho))) / 2
    ts = G[1:] - G[0]
    x = solve(attention(b, USA), circle([0.0, np.arccos(rho[0])], [0.5, 0.5]), ts)
    np.testing.assert_allclose((x[:, 0] * x[:, 1]).sum(axis=1), rho[1:], rtol=0, atol=TRUTH)


def test_the_place_where_weighted_tokens_meet():
    """USA on the circle: sum_i w_i a_i' = sum_ij w_i w_j e^{b cos(a_j - a_i)} sin(a_j - a_i) = 0,
    by symmetry, at any b. Tokens of a half circle therefore meet at the mean of their angles."""
    a, w = np.array([-0.9, -0.2, 0.3, 0.8, 1.3]), np.array([0.1, 0.15, 0.2, 0.25, 0.3])
    moved = angles(solve(attention(1.0, USA), circle(a, w), [0.5, 2.0, 20.0]))
    np.testing.assert_allclose(moved @ w, a @ w, rtol=0, atol=TRUTH)
    np.testing.assert_allclose(moved[-1], a @ w, rtol=0, atol=TRUTH)


def test_weights_do_not_matter_to_two_tokens_at_b_0():
    """b = 0: the first moves towards the second at w_2 sin, the second at w_1 sin, of the angle
    between them, which closes at w_1 + w_2 = 1 times its sine: rho = tanh(t + artanh rho_0), and
    they meet at w_1 a_1 + w_2 a_2."""
    ts, angle = np.array([0.5, 1.0, 14.0]), 2.0
    for w in (0.5, 0.9):
        x = solve(attention(0.0, USA), circle([0.0, angle], [w, 1 - w]), ts)
        exact = np.tanh(ts + np.arctanh(np.cos(angle)))
        np.testing.assert_allclose((x[:, 0] * x[:, 1]).sum(axis=1), exact, rtol=0, atol=TRUTH)
        np.testing.assert_allclose(angles(x)[-1, 0], (1 - w) * angle, rtol=0, atol=1e-5)


def test_an_antisymmetric_value_keeps_energy_and_volume():
    """USA in R^d with V = A, A^T = -A: with E = 1/(2b) sum_ij w_i w_j e^{b <x_i, x_j>} and
    F = int e^{b <x, y>} y, dE/dt = sum_i w_i <F_i, A F_i> = 0, and div X = b int e^{b <x, y>}
    <y, A y> = 0: Hamilton's equations for A = J, E the energy. |x|^2 moves."""
    x, w, b = normal(5, 5, 2), np.array([0.1, 0.15, 0.2, 0.25, 0.3]), 0.6
    field = attention(b, USA, np.array([[0.0, 1.0], [-1.0, 0.0]]), FLAT)
    mu = weighted(x, w)
    found = solve(field, mu, [0.5, 1.0, 2.0])
    energy = lambda x: w @ np.exp(b * (x @ x.swapaxes(-1, -2))) @ w
    np.testing.assert_allclose(energy(found), energy(x), rtol=10 * TRUTH)
    assert np.abs((found[-1] ** 2).sum(axis=1) - (x**2).sum(axis=1)).max() > 0.3
    divergence = eqx.filter_jit(jf.divergence)(field, 0.0, mu.points, mu)
    np.testing.assert_allclose(divergence, 0, atol=ROUNDING)


def test_units_of_length_are_units_of_temperature():
    """In R^d the scores b <x, y> are those of c x, c y at b / c^2, and the mean of c y is c times
    that of y: c x(t) is the flow from c x(0) at b / c^2, for any law of the scores and any V."""
    x, w, c, ts = normal(7, 5, 2), [0.1, 0.15, 0.2, 0.25, 0.3], 2.5, [0.1, 0.2, 0.4]
    V = normal(8, 2, 2)
    plain = solve(attention(0.5, USA, V, FLAT), weighted(x, w), ts)
    scaled = solve(attention(0.5 / c**2, USA, V, FLAT), weighted(c * x, w), ts)
    np.testing.assert_allclose(scaled, c * plain, rtol=0, atol=TRUTH)
    assert np.abs(plain[-1] - x).max() > 0.3


# ------------------------------------------------------------------ softmax attention


def test_the_cross_ratio_that_b_0_keeps():
    """b = 0 on S^{d-1}: x' = P m with one vector m for all, and d|x_i - x_j|^2 / dt =
    -<m, x_i + x_j> |x_i - x_j|^2 (Watanabe and Strogatz 1994 for the circle: Moebius maps). In
    |13| |24| / (|14| |23|) each index is above and below once, so that it is constant."""
    x = normal(6, 5, 3)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    moved = solve(attention(0.0), weighted(x, [0.1, 0.15, 0.2, 0.25, 0.3]), [0.5, 1.0, 3.0])
    chord = lambda x, i, j: np.linalg.norm(x[..., i, :] - x[..., j, :], axis=-1)
    ratio = lambda x: chord(x, 0, 2) * chord(x, 1, 3) / (chord(x, 0, 3) * chord(x, 1, 2))
    np.testing.assert_allclose(ratio(moved), ratio(x), rtol=100 * TRUTH)  # of chords of 0.1
    assert np.abs(moved[-1] - x).max() > 0.3


def test_equiangular_tokens_at_b_0():
    """rho' = (2/n) (1 - rho) ((n-1) rho + 1), so ((n-1) rho + 1) / (1 - rho) = C e^{2t}:
    rho = (C e^{2t} - 1) / (C e^{2t} + n - 1)."""
    n, rho, ts = 3, 0.1, np.array([0.3, 0.7, 2.0])
    mu = weighted(jf.measure.simplex(n, 3, rho).points, np.full(n, 1 / n))
    x = solve(attention(0.0), mu, ts)[:, :n]
    grown = ((n - 1) * rho + 1) / (1 - rho) * np.exp(2 * ts)
    exact = (grown - 1) / (grown + n - 1)
    products = (x @ x.swapaxes(1, 2))[:, ~np.eye(n, dtype=bool)]
    expected = np.broadcast_to(exact[:, None], products.shape)
    np.testing.assert_allclose(products, expected, rtol=0, atol=TRUTH)


# ------------------------------------------------------------------ mean shift


def line(points, weights):
    """24 tokens on the line, those that are missing without mass."""
    missing = 24 - len(points)
    logs = np.append(np.log(weights), np.full(missing, -np.inf))
    return jf.Measure(jnp.asarray(np.append(points, np.zeros(missing)))[:, None], jnp.asarray(logs))


def gauss(variance):
    """N(0, variance) by 24 nodes."""
    x, w = np.polynomial.hermite_e.hermegauss(24)
    return line(np.sqrt(variance) * x, w)


def test_mean_shift_of_a_gaussian_law():
    """E_{mu_x}[y] = b s x / (1 + b s) for N(0, s), so X = -x / (1 + b s) and s' = -2 s / (1 + b s):
    log s + b s falls by 2t, and s = W(b s_0 e^{b s_0 - 2t}) / b with Lambert's W."""
    b, s, ts = 0.5, 0.8, np.array([0.3, 0.7, 1.5])
    x = solve(jf.MeanShift(b), gauss(s), ts)[..., 0]
    w = np.asarray(gauss(s).weights)
    exact = lambertw(b * s * np.exp(b * s - 2 * ts)).real / b
    np.testing.assert_allclose(x**2 @ w, exact, rtol=0, atol=TRUTH)


def test_noise_that_mean_shift_withstands():
    """With noise, s' = -2 s / (1 + b s) + 2 / kappa: at rest at s = 1 / (kappa - b), and nowhere
    for kappa <= b, where noise is too strong for attraction within 1 / sqrt(b)."""
    b, kappa = 0.5, 2.0
    mu = gauss(1 / (kappa - b))
    x = mu.points[:, 0]
    velocity = eqx.filter_jit(lambda field, x, mu: field(0.0, x, mu))(
        jf.MeanShift(b), mu.points, mu
    )[:, 0]
    np.testing.assert_allclose(2 * mu.weights @ (x * velocity) + 2 / kappa, 0, atol=1e-10)
    np.testing.assert_allclose(velocity, -(1 - b / kappa) * x, rtol=0, atol=1e-6)


def test_the_time_for_two_tokens_of_mean_shift_to_meet():
    """Tokens +-x: X = x tanh(b x^2) - x, so u = x^2 has u' = -4 u / (1 + e^{2bu}) and
    4 t = log(u_0 / u) + Ei(2 b u_0) - Ei(2 b u): from afar about e^{2 b u_0} / (2 b u_0)."""
    b, u = 0.5, np.array([4.0, 3.0, 1.0, 0.1])
    primitive = (np.log(u) + expi(2 * b * u)) / 4
    ts = primitive[0] - primitive[1:]
    x = solve(jf.MeanShift(b), line([-2.0, 2.0], [0.5, 0.5]), ts)[:, :2, 0]
    exact = np.sqrt(u[1:])
    np.testing.assert_allclose(x, np.stack([-exact, exact], axis=1), rtol=0, atol=TRUTH)
