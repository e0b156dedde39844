"""Maps of the literature against their exact results, or a direct formula in float64."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

import jaxflow as jf
from jaxflow.fields.base import divergence_by_derivatives

pytestmark = pytest.mark.usefixtures("x64")

CONTROLLER = diffrax.PIDController(rtol=1e-10, atol=1e-12)
# Solves to the tolerances above, over some tens of steps.
TRUTH = 1e-9


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def spherical(seed, n, d):
    x = normal(seed, n, d)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def softmax(s):
    weights = np.exp(s - s.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def solve(field, points, ts):
    return jf.flow(
        field,
        jf.Measure(points),
        t1=ts[-1],
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts, float)),
        stepsize_controller=CONTROLLER,
        adjoint=diffrax.ForwardMode(),
    ).measures.points


# ------------------------------------------------------------------ the published step


def test_normalised_euler_is_the_published_loop():
    """x <- (x + h F) / |x + h F|, F = V softmax(beta x Q^T K x^T) x, written in NumPy."""
    beta, h, steps = 4.0, 0.1, 100
    Q, K, V = normal(1, 2, 3), normal(2, 2, 3), normal(3, 3, 3)
    x = np.asarray(spherical(0, 12, 3))
    sol = jf.flow(
        jf.SelfAttention(Q, K, V, beta=beta),
        jf.Measure(x),
        t1=h * steps,
        dt0=h,
        solver=jf.solvers.NormalisedEuler(),
        saveat=diffrax.SaveAt(t1=True, steps=True),
        max_steps=steps,
    )
    loop = []
    for _ in range(steps):
        x = x + h * softmax(beta * (x @ Q.T) @ (x @ K.T).T) @ x @ V.T
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        loop.append(x)
    assert int(sol.stats["num_steps"]) == int(sol.stats["num_evaluations"]) == steps
    # The times k h round, and with them the steps, by 1e-14; the flow is not chaotic to t = 10.
    np.testing.assert_allclose(sol.measures.points[:steps], loop, rtol=0, atol=1e-12)


def test_normalised_euler_is_late():
    """Two tokens at b = 4: rho goes from 0 to 0.9 by the exact time 8.390296; at that time the
    published step with h = 0.1 has come as far as the flow had some 8 % earlier."""
    mu0 = jf.measure.from_angles(np.array([0.0, np.pi / 2]))
    late = jf.flow(
        jf.SelfAttention(beta=4.0), mu0, t1=20.0, dt0=0.1, solver=jf.solvers.NormalisedEuler(),
        saveat=diffrax.SaveAt(steps=True, t1=True), max_steps=200,
    )  # fmt: skip
    x = np.asarray(late.measures.points)[:200]
    rho = (x[:, 0] * x[:, 1]).sum(axis=1)
    time = np.interp(0.9, rho, np.asarray(late.ts)[:200])
    assert 1.04 < time / 8.390296 < 1.11


def test_normalised_euler_in_time_sums_and_splittings():
    """F of a sum, of a multiple and of a field in time is that before their projection."""
    mu0 = jf.Measure(spherical(0, 5, 3))
    attention, drift = (
        jf.SelfAttention(beta=2.0),
        jf.LinearDrift(normal(1, 3, 3), geometry=jf.Sphere()),
    )
    field = jf.TimeDependent(jf.Constant(attention + 0.5 * drift))
    step = lambda solver: jf.flow(field, mu0, t1=0.2, dt0=0.2, solver=solver).last.points
    x = np.asarray(mu0.points)
    unit = lambda y: y / np.linalg.norm(y, axis=1, keepdims=True)
    pull = lambda x: softmax(2 * x @ x.T) @ x
    push = lambda x: 0.5 * x @ np.asarray(drift.matrix).T
    euler = jf.solvers.NormalisedEuler()
    np.testing.assert_allclose(step(euler), unit(x + 0.2 * (pull(x) + push(x))), rtol=0, atol=1e-14)
    half = unit(x + 0.2 * pull(x))
    split = unit(half + 0.2 * push(half))
    np.testing.assert_allclose(step(jf.solvers.LieTrotter(euler)), split, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ interactions


@eqx.filter_jit
def both(field, x, mu):
    """The velocity, and the divergence in closed form and by derivatives."""
    exact = divergence_by_derivatives(field, 0.0, x, mu)
    return field(0.0, x, mu), jf.divergence(field, 0.0, x, mu), exact


def l2_weights(q, k, w, beta):
    return softmax(np.log(w)[None] - beta / 2 * ((q[:, None] - k[None]) ** 2).sum(axis=-1))


def sigmoid_weights(q, k, w, beta):
    return w[None] / (1 + np.exp(-(beta * q @ k.T + 0.25)))


def top_weights(q, k, w, beta):
    s = beta * q @ k.T
    least = np.sort(s, axis=1)[:, -3:-2]
    return softmax(np.where(s >= least, s, -np.inf) + np.log(w)[None])


WEIGHTS: dict[str, Any] = {
    "L2": (l2_weights, {"interaction": jf.L2()}),
    "sigmoid": (sigmoid_weights, {"interaction": jf.Sigmoid(0.25)}),
    "top 3": (top_weights, {"mask": jf.masks.TopK(3)}),
}


@pytest.mark.parametrize("geometry", [jf.Euclidean(), jf.Sphere()], ids=["R^d", "sphere"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_interactions_are_their_formulas(name, geometry):
    """V sum_j w_ij y_j, and its divergence against d derivatives; 9 weighted tokens, 5 probes."""
    formula, options = WEIGHTS[name]
    Q, K, V, beta = normal(1, 2, 3), normal(2, 2, 3), normal(3, 3, 3), 1.7
    field = jf.SelfAttention(Q, K, V, beta=beta, geometry=geometry, **options)
    mu = jf.Measure(normal(4, 9, 3), normal(5, 9))
    x = spherical(6, 5, 3)
    y = np.asarray(mu.points)
    weights = formula(np.asarray(x) @ Q.T, y @ K.T, np.asarray(mu.weights), beta)
    velocity, divergence, derivatives = both(field, x, mu)
    expected = geometry.project(x, jnp.asarray(weights @ y @ V.T))
    # Sums of 9 terms of size 10.
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(divergence, derivatives, rtol=0, atol=1e-12)


def test_l2_attention_of_a_gaussian_measure():
    """mu = N(m, S): mu_x = N(A (S^{-1} m + beta K^T Q x), A), A = (S^{-1} + beta K^T K)^{-1}.

    (arXiv 2501.18322.) 32 Gauss-Hermite nodes a side integrate e^{-beta/2 |Q x - K y|^2} to 1e-10.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    S, m, beta = np.array([[0.5, 0.2], [0.2, 0.4]]), np.array([0.3, -0.2]), 0.7
    Q, K, V = normal(1, 2, 2), normal(2, 2, 2) / 2, normal(3, 2, 2)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    logs = np.log(np.outer(weights, weights).ravel())
    mu = jf.Measure(m + grid @ np.linalg.cholesky(S).T, logs)
    field = jf.SelfAttention(Q, K, V, beta=beta, interaction=jf.L2(), geometry=jf.Euclidean())
    x = normal(4, 5, 2) / 2
    precision = np.linalg.inv(S)
    A = np.linalg.inv(precision + beta * K.T @ K)
    exact = (A @ (precision @ m + beta * (x @ Q.T @ K)).T).T @ V.T
    np.testing.assert_allclose(field(0.0, jnp.asarray(x), mu), exact, rtol=0, atol=1e-10)


def alibi_weights(scores, slope):
    """softmax_j(s_ij - slope (i - j)), j <= i."""
    i, j = np.indices(scores.shape)
    return softmax(np.where(j <= i, scores - slope * (i - j), -np.inf))


@pytest.mark.parametrize("heads", [0, 4], ids=["one slope", "a slope a head"])
def test_alibi_is_its_formula(heads):
    x = normal(1, 7, 8)
    mu = jf.Measure(x)
    if heads:
        field = jf.MultiHeadAttention(
            8, heads, interaction=jf.ALiBi(jf.fields.alibi_slopes(heads)), causal=True,
            key=jax.random.key(0),
        )  # fmt: skip
        Q, K, V, O = (np.asarray(a) for a in (field.query, field.key, field.value, field.output))
        beta, slopes = 2**-0.5, [2**-2, 2**-4, 2**-6, 2**-8]
    else:
        interaction, flat = jf.ALiBi(0.4), jf.Euclidean()
        field = jf.SelfAttention(beta=0.3, interaction=interaction, causal=True, geometry=flat)
        Q = K = V = O = np.eye(8)[None]
        beta, slopes = 0.3, [0.4]
    parts = [
        alibi_weights(beta * (x @ q.T) @ (x @ k.T).T, slope) @ (x @ v.T) @ o.T
        for q, k, v, o, slope in zip(Q, K, V, O, slopes, strict=True)
    ]
    velocity, divergence, derivatives = both(field, mu.points, mu)
    total = np.sum(parts, axis=0)
    np.testing.assert_allclose(velocity, total, rtol=0, atol=1e-13)
    np.testing.assert_allclose(divergence, derivatives, rtol=0, atol=1e-12)
    # The last token, continued by the keys and values of all.
    last = field.attend(0.0, mu.points[6:], field.keys_values(0.0, mu.points), 6)
    np.testing.assert_allclose(last, total[6:], rtol=0, atol=1e-13)


# ------------------------------------------------------------------ maps that are no matrices


@pytest.mark.parametrize("geometry", [jf.Euclidean(), jf.Sphere()], ids=["R^d", "sphere"])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_maps_may_be_modules(which, geometry):
    """P_x E_{mu_x}[V(y)] with a network in place of one of Q, K, V."""
    maps: dict[str, Any] = {
        "query": normal(1, 2, 3),
        "key": normal(2, 2, 3),
        "value": normal(3, 3, 3),
    }
    out = 3 if which == "value" else 2
    maps[which] = eqx.nn.MLP(3, out, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    field = jf.SelfAttention(**maps, beta=1.7, geometry=geometry)
    mu, x = jf.Measure(normal(4, 9, 3)), spherical(6, 5, 3)
    on = lambda f, z: np.asarray(jax.vmap(f)(z)) if callable(f) else np.asarray(z) @ f.T
    y = mu.points
    weights = softmax(1.7 * on(maps["query"], x) @ on(maps["key"], y).T)
    velocity, divergence, derivatives = both(field, x, mu)
    expected = geometry.project(x, jnp.asarray(weights @ on(maps["value"], y)))
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(divergence, derivatives, rtol=0, atol=1e-12)


def test_the_arrays_of_a_module_are_parameters_in_time():
    mlp = lambda seed: eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(seed))
    layers = [jf.SelfAttention(value=mlp(k), geometry=jf.Euclidean()) for k in (0, 1)]
    field = jf.TimeDependent(jf.PiecewiseConstant(layers, [0.0, 0.1, 0.2]))
    mu = jf.Measure(normal(0, 4, 2))
    x = jf.flow(field, mu, t1=0.2, dt0=0.1, solver=diffrax.Euler()).last.points
    for layer in layers:
        mu = jf.Measure(mu.points + 0.1 * layer(0.0, mu.points, mu))
    np.testing.assert_allclose(x, mu.points, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ near attention


def test_mean_shift_climbs_the_density_of_the_kernel():
    """X = grad log rho / beta, rho(x) = sum_j w_j e^{-beta/2 |x - y_j|^2}."""
    mu, x, beta = jf.Measure(normal(0, 9, 2), normal(1, 9)), jnp.asarray(normal(2, 5, 2)), 1.3
    square = lambda x: ((mu.points - x[None]) ** 2).sum(axis=1)
    log_density = lambda x: jax.nn.logsumexp(mu.log_weights - beta / 2 * square(x))
    velocity, divergence, derivatives = both(jf.MeanShift(beta), x, mu)
    exact = jax.vmap(jax.grad(log_density))(x) / beta
    np.testing.assert_allclose(velocity, exact, rtol=0, atol=1e-13)
    np.testing.assert_allclose(divergence, derivatives, rtol=0, atol=1e-12)


def test_bounded_confidence_is_the_published_iteration():
    """x_i <- the mean of those within the radius, until nothing moves, to rounding."""
    x, radius = np.random.default_rng(0).uniform(0, 10, (40, 1)), 1.0
    field, euler = jf.BoundedConfidence(radius), diffrax.Euler()
    sol = jf.flow(field, jf.Measure(x), t1=12.0, dt0=1.0, solver=euler).last.points
    for _ in range(12):
        trusted = np.abs(x - x.T) <= radius
        x = trusted @ x / trusted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sol, x, rtol=0, atol=1e-13)
    final = np.unique(np.round(x, 9))
    assert len(final) > 2 and np.diff(final).min() > radius
    # A probe far from all stays where it is.
    mu, probe = jf.Measure(x), jnp.array([[99.0], [1.0]])
    velocity, divergence, derivatives = both(field, probe, mu)
    assert velocity[0] == 0 and divergence[0] == 0
    np.testing.assert_allclose(divergence, derivatives, rtol=0, atol=1e-14)


def test_weighted_attention_climbs_its_energy():
    """USA: d/dt 1/(2 beta) E[e^{beta <x, D y>}] = E|x'|^2 (Burger et al., arXiv 2501.03096), and
    the energy of a Dirac at the leading eigenvector is the largest, where D > 0."""
    A, beta = normal(0, 3, 3), 0.6
    D = A @ A.T / 3
    field = jf.fields.weighted_attention(D, beta=beta, interaction=jf.Unnormalised())
    mu = jf.Measure(spherical(1, 12, 3))
    energy = jf.observables.InteractionEnergy(beta, key=D)

    @eqx.filter_jit
    def motion(field, energy, x):
        v = field(0.0, x, jf.Measure(x))
        return v, jax.jvp(lambda x: energy(0.0, jf.Measure(x)), (x,), (v,))[1]

    v, growth = motion(field, energy, mu.points)
    np.testing.assert_allclose(growth, (v**2).sum(axis=1).mean(), rtol=1e-12)
    value, vector = np.linalg.eigh(D)
    top = jf.Measure(vector[:, -1:].T)
    np.testing.assert_allclose(energy(0.0, top), np.exp(beta * value[-1]) / (2 * beta), rtol=1e-13)
    assert jnp.abs(field(0.0, top.points, top)).max() < 1e-14 < energy(0.0, top) - energy(0.0, mu)


# ------------------------------------------------------------------ rescaled tokens


GENERAL = [[0.8, 0.3], [-0.2, 0.5]]


@pytest.mark.parametrize(
    "V, interaction",
    [
        pytest.param(GENERAL, jf.Softmax(), id="V, SA"),
        pytest.param(None, jf.Unnormalised(), id="V = I, USA"),
        pytest.param(GENERAL, jf.Unnormalised(), id="V, USA", marks=pytest.mark.slow),
        pytest.param(None, jf.Softmax(), id="V = I, SA", marks=pytest.mark.slow),
    ],
)
def test_rescaled_tokens_are_those_of_the_plain_flow(V, interaction):
    """z = e^{-tV} x (arXiv 2305.05465)."""
    ts, scale = np.array([0.25, 0.5, 1.0]), 0.1
    Q, K = normal(1, 3, 2), normal(2, 3, 2)
    attention = jf.SelfAttention(
        Q, K, V, beta=scale, interaction=interaction, geometry=jf.Euclidean()
    )
    start = normal(3, 7, 2) / 2
    x = solve(attention, start, ts)
    z = solve(jf.TimeDependent(jf.Rescaled(attention)), start, ts)
    growth = np.stack([expm(-t * np.eye(2) if V is None else -t * np.asarray(V)) for t in ts])
    np.testing.assert_allclose(z, np.einsum("tij,tnj->tni", growth, x), rtol=0, atol=TRUTH)
    assert np.abs(z[-1] - start).max() > 0.05


@pytest.mark.slow
def test_a_drift_is_no_change_of_variable_for_softmax():
    """Adding -V x to softmax attention gives other tokens than z; to hardmax attention, z."""
    start, ts = normal(3, 7, 2), np.array([1.0])
    for interaction, same in ((jf.Softmax(), False), (jf.Hardmax(), True)):
        attention = jf.SelfAttention(interaction=interaction, geometry=jf.Euclidean())
        drifted = solve(attention + jf.LinearDrift(-1.0), start, ts)
        z = np.exp(-1) * solve(attention, start, ts)
        assert (np.abs(drifted - z).max() < 1e-7) == same


# ------------------------------------------------------------------ hardmax, exactly


def hardmax(*args, **options):
    return jf.SelfAttention(*args, interaction=jf.Hardmax(), geometry=jf.Euclidean(), **options)


def test_hardmax_followers_contract_exactly():
    """x' = mean_{C_i} x_j - x_i: leaders stay, the distance to a leader is e^{-t} of the first.

    (arXiv 2407.01602, in continuous time.)
    """
    leaders = np.asarray(3 * jf.measure.circle(3).points)
    points = np.concatenate([leaders, normal(1, 9, 2) / 4])
    leader = (points @ leaders.T).argmax(axis=1)
    ts = np.array([0.0, 0.5, 1.0, 5.0])
    sol = jf.hardmax_flow(hardmax() + jf.LinearDrift(-1.0), jf.Measure(points), t1=5.0, ts=ts)
    assert len(sol.events) == 0 and sol.leaders.shape == (1, 12, 12)
    exact = leaders[leader] + np.exp(-ts)[:, None, None] * (points - leaders[leader])
    np.testing.assert_allclose(sol.measures.points, exact, rtol=0, atol=1e-14)


def test_hardmax_events_are_those_of_a_direct_formula():
    """Tokens that grow by a drift alone, x_2' = 0.3 x_2: the third is led by the first until
    <x_3, x_2> = e^{0.6 t} passes <x_3, x_1> = 2."""
    x = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.5]])
    field = 0.0 * hardmax() + jf.LinearDrift(np.diag([0.0, 0.3]))
    sol = jf.hardmax_flow(field, jf.Measure(x), t1=4.0, ts=[1.0, 4.0])
    # Scores of size 2 tie within 32 roundings of 2e-16: 1.2e-14 in time, at their rate of 1.2.
    np.testing.assert_allclose(sol.events, [np.log(2) / 0.6], rtol=0, atol=2e-14)
    np.testing.assert_array_equal(sol.leaders[:, 2], [[1, 0, 0], [0, 1, 0]])
    grown = x * np.exp(np.array([[0.0, 0.3]]) * np.array([1.0, 4.0])[:, None, None])
    np.testing.assert_allclose(sol.measures.points, grown, rtol=1e-14)


def test_hardmax_flow_agrees_with_small_steps():
    """Q and V of the general form, with events: steps of Runge and Kutta err at each of them by
    their length times the jump of the velocity; the exact flow does not."""
    x, V, Q = normal(5, 10, 2), np.eye(2) + normal(1, 2, 2) / 4, np.eye(2) + normal(2, 2, 2) / 2
    field = 0.5 * (hardmax(Q, None, V) + jf.LinearDrift(-0.8))
    exact = jf.hardmax_flow(field, jf.Measure(x), t1=3.0)
    assert len(exact.events) >= 2
    errors = []
    for h in (4e-3, 1e-3):
        near = jf.flow(
            field, jf.Measure(x), t1=3.0, dt0=h, solver=diffrax.Heun(),
            stepsize_controller=diffrax.ConstantStepSize(),
        ).last.points  # fmt: skip
        errors.append(np.abs(near - exact.measures.points[-1]).max())
    assert errors[1] < 2e-3 and errors[1] < errors[0]


# ------------------------------------------------------------------ random matrices


def test_laws_of_random_matrices():
    """Moments within five standard errors, and the edges of Wigner's semicircle."""
    d = 200
    query, key, value = jf.fields.GaussianMatrices(rank=50, value=True)(d, key=jax.random.key(0))
    assert query is not None and key is not None and value is not None
    assert query.shape == key.shape == (50, d) and value.shape == (d, d)
    for a in (query, key, value):
        assert abs(d * float((a**2).mean()) - 1) < 5 * np.sqrt(2 / a.size)
    assert np.linalg.matrix_rank(query.T @ key) == 50
    _, _, goe = jf.fields.GOEMatrices()(d, key=jax.random.key(1))
    values = np.linalg.eigvalsh(goe)
    np.testing.assert_array_equal(goe, goe.T)
    # Fluctuations of the edge are of size d^{-2/3} = 0.03; int x^2 of the semicircle is 1.
    np.testing.assert_allclose([values[0], values[-1]], [-2, 2], rtol=0, atol=0.15)
    np.testing.assert_allclose((values**2).mean(), 1 + 1 / d, rtol=5 * 2 / d)
    law, B = jf.fields.SignedValue(np.diag([1.0, 2.0])), np.diag([1.0, 2.0])
    signs = [float(law(2, key=k)[2][0, 0]) for k in jax.random.split(jax.random.key(2), 64)]
    assert set(signs) == {-1.0, 1.0} and abs(np.sum(signs)) < 5 * 8
    np.testing.assert_array_equal(abs(law(2, key=jax.random.key(0))[2]), B)


def test_a_phase_diagram_with_matrices_of_each_system():
    """The share of pairs that have met, by a flow of each system alone."""
    law = jf.fields.GaussianMatrices(rank=2)
    ts, key = [0.0, 4.0, 8.0], jax.random.key(0)
    diagram = jf.phase_diagram(
        [6.0], ts, n=5, d=3, systems=3, threshold=0.9, tolerance=1e-8, matrices=law, key=key
    )
    assert np.isnan(diagram.curve).all()
    points = jf.measure.uniform_sphere(15, 3, key=key).points.reshape(3, 5, 3)
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    off, shares = ~np.eye(5, dtype=bool), []
    for x, k in zip(points, keys, strict=True):
        field = jf.SelfAttention(*law(3, key=k), beta=6.0)
        saved = solve(field, x, ts)
        shares.append([(np.asarray(y @ y.T)[off] >= 0.9).mean() for y in saved])
    np.testing.assert_allclose(diagram.probability[0], np.mean(shares, axis=0), rtol=1e-12)
    assert 0 < diagram.probability[0, 1] < 1
