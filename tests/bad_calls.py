# The arguments are wrong on purpose.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false
"""Calls that are not asked right: a name, the call, the error and what its message must say.

Run as a program it writes the errors as JSON: users have no checks of types at run time, as tests
have, which would come first.
"""

# pyright: reportArgumentType=false
# The arguments are wrong on purpose.

import json
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf
from jaxflow import density, masks, measure, models, observables, training, viz
from jaxflow.density import closures

KEY = jax.random.key(0)
MU = jf.Measure(np.eye(4, 3, dtype=np.float32))
FLAT = jf.SelfAttention(geometry=jf.Euclidean())
LEADERS = jf.SelfAttention(interaction=jf.Hardmax(), geometry=jf.Euclidean())
NAN, INF = float("nan"), float("inf")


def language_model(**changed):
    options = dict(vocab_size=11, dim=8, heads=2, layers=1, context=8, key=KEY)
    return models.LanguageModel(**(options | changed))


def fit(**options):
    model = models.ResidualNetwork(64, 10, 2, 1, width=2, key=KEY)
    return training.fit(model, training.image_data(batch_size=8), steps=1, **options)


def build(**changed):
    config = dict(model="ResidualNetwork", inputs=5, outputs=3, dim=8, layers=1, width=8)
    return models.build(config | changed)


def attend(mask, **options):
    return jf.softmax_expectation(MU.points, MU.points, MU.points, mask=mask, **options)


def compress(mu=MU, space=jf.Sphere(), reach=9.0, tolerance=1e-5):
    return measure.compress(mu, space, reach=reach, tolerance=tolerance)


def pruned(backend, **options):
    return jf.softmax_expectation(MU.points, MU.points, MU.points, backend=backend, **options)


def log_density(x0=MU.points[:3], log_rho0=np.zeros(3), **options):
    return jf.log_density(jf.SelfAttention(), MU, x0, log_rho0, t1=1.0, **options)


def solve(field=jf.SelfAttention(), rho0=np.ones(8), grid=density.Circle(8), **options):
    return density.solve(field, rho0, grid, t1=1.0, **options)


def evolve(z0, closure=closures.OttAntonsen()):
    return closures.evolve(closure, z0, t1=1.0)


def masked(interaction, mask=masks.Blocks(2)):
    return jf.SelfAttention(interaction=interaction, mask=mask)(0.0, MU.points, MU)


def noisy(kappa=1.0, field=jf.SelfAttention(), **options):
    noise = jf.Noise(kappa, key=KEY)
    return jf.flow(field, measure.simplex(3, 3), t1=1.0, noise=noise, **options)


CALLS = {
    # noise
    "no temperature": (lambda: noisy(0.0), ValueError, "kappa must be positive and finite, got 0"),
    "noise without a step": (lambda: noisy(), ValueError, "fixed steps: pass their length, dt0"),
    "a path coarser than its steps": (
        lambda: jf.flow(
            jf.SelfAttention(),
            measure.simplex(3, 3),
            t1=1.0,
            dt0=0.1,
            noise=jf.Noise(1.0, key=KEY, tolerance=0.2),
        ),
        ValueError,
        "must be below a step, dt0=0.1; got 0.2",
    ),
    "an implicit method for noise": (
        lambda: noisy(dt0=0.1, solver=diffrax.Kvaerno5()),
        ValueError,
        "Kvaerno5 is no method for noise: pass",
    ),
    "splitting noise": (
        lambda: noisy(dt0=0.1, solver=jf.solvers.Strang(diffrax.Heun())),
        ValueError,
        "Strang is no method for noise",
    ),
    "additive noise on a sphere": (
        lambda: noisy(dt0=0.1, solver=diffrax.ShARK()),
        ValueError,
        "ShARK is for noise that does not depend on the place",
    ),
    "a number for noise": (
        lambda: jf.flow(jf.SelfAttention(), measure.simplex(3, 3), t1=1.0, noise=2.0),
        TypeError,
        "noise must be an instance such as jaxflow.Noise",
    ),
    "noise on an ellipsoid": (
        lambda: noisy(
            field=jf.SelfAttention(geometry=jf.Ellipsoid([1.0, 2.0, 1.0], [0.0, 0.0, 0.0])),
            dt0=0.1,
        ),
        ValueError,
        "noise is for R.d and for spheres|must lie on",
    ),
    # compressed measures
    "no reach": (lambda: compress(reach=0.0), ValueError, "positive and finite, got 0.0"),
    "a reach without end": (lambda: compress(reach=INF), ValueError, "positive and finite"),
    "a tolerance of 0": (lambda: compress(tolerance=0.0), ValueError, r"in \(0, 1\), got 0.0"),
    "a tolerance of NaN": (lambda: compress(tolerance=NAN), ValueError, r"in \(0, 1\), got nan"),
    "a tolerance below rounding": (
        lambda: compress(tolerance=1e-9),
        ValueError,
        "at least 9.5e-07, eight roundings of float32; got 1e-09. Use float64",
    ),
    "no space": (lambda: compress(space=jf.Euclidean()), TypeError, "space must be an instance"),
    "a sphere in R^4": (
        lambda: compress(measure.simplex(4, 4)),
        ValueError,
        "on spheres in R\\^2 and R\\^3, got tokens of dimension 4",
    ),
    "a box of another dimension": (
        lambda: compress(space=measure.Box([-1.0], [1.0])),
        ValueError,
        "a box of 1 dimensions holds no tokens of dimension 3",
    ),
    "a box inside out": (lambda: measure.Box([1.0], [-1.0]), ValueError, "low < high"),
    "a box in R^4": (lambda: measure.Box(4 * [-1.0], 4 * [1.0]), ValueError, "d from 1 to 3"),
    "too long queries": (lambda: compress(reach=1e6), ValueError, "lower the reach"),
    "points of 16 bits": (
        lambda: compress(jf.Measure(MU.points.astype(jnp.bfloat16))),
        TypeError,
        "cast them to float32",
    ),
    "compressed order": (
        lambda: jf.Compressed(jf.SelfAttention(causal=True)),
        ValueError,
        "causal=True asks for: compress attention without masks",
    ),
    "a compressed maximum": (
        lambda: jf.Compressed(jf.SelfAttention(interaction=jf.Hardmax())),
        ValueError,
        "Hardmax is no integral",
    ),
    "compressed without a space": (
        lambda: jf.Compressed(jf.SelfAttention(geometry=jf.Euclidean())),
        ValueError,
        "pass space=jaxflow.Sphere",
    ),
    "compressed and unknown": (
        lambda: jf.Compressed(lambda t, x, mu: x),
        TypeError,
        "only fields can be",
    ),
    # pruned
    "pruned to nothing": (lambda: pruned("pruned:0"), ValueError, "between 0 and 1"),
    "pruned to a word": (lambda: pruned("pruned:few"), ValueError, "pruned:1e-4|between 0 and 1"),
    "pruned below rounding": (
        lambda: pruned("pruned:1e-9"),
        NotImplementedError,
        "at least 1e-06 where sums are float32, got 1e-09",
    ),
    "pruned order": (lambda: pruned("pruned", causal=True), NotImplementedError, "orders the keys"),
    # masks
    "a size for a mask": (
        lambda: attend(64),
        TypeError,
        r"jaxflow.masks.Blocks\(64\), or None; got",
    ),
    "a table for a mask": (lambda: attend(np.eye(4, dtype=bool)), TypeError, "BlockSparse"),
    "a class for a mask": (lambda: attend(masks.Blocks), TypeError, "must be an instance"),
    "no size of blocks": (lambda: masks.Blocks(0), ValueError, "size must be at least 1, got 0"),
    "half a block": (lambda: masks.Blocks(2.5), TypeError, "size must be a whole number, got 2.5"),
    "a window below 0": (lambda: masks.Window(-1), ValueError, "left must be at least 0, got -1"),
    "no stride": (lambda: masks.Strided(0, 1), ValueError, "stride must be at least 1, got 0"),
    "no global token": (lambda: masks.Global(0), ValueError, "tokens must be at least 1"),
    "a seed below 0": (lambda: masks.Random(1, 4, seed=-1), ValueError, "seed must be at least 0"),
    "a table of numbers": (
        lambda: masks.BlockSparse(np.eye(2), 4),
        TypeError,
        "must be Boolean, got float64. Pass table.astype",
    ),
    "a row for a table": (lambda: masks.BlockSparse([True], 4), ValueError, r"got shape \(1,\)"),
    "a ragged table": (lambda: masks.BlockSparse([[True], []], 4), TypeError, "must be Boolean"),
    "a table that is too small": (
        lambda: attend(masks.BlockSparse([[True]], 3)),
        ValueError,
        "cover 3 x 3, got 4 queries and 4 keys. Pass a larger table",
    ),
    "a small table in a union": (
        lambda: attend(masks.Global(1) | masks.BlockSparse([[True]], 3)),
        ValueError,
        "must cover all queries and keys",
    ),
    "no largest score": (lambda: masks.TopK(0), ValueError, "k must be at least 1, got 0"),
    "a tolerance below 0": (lambda: masks.TopK(1, -1.0), ValueError, "not negative, got -1.0"),
    "among what is no pattern": (lambda: masks.TopK(1, among=3), TypeError, "among must be an"),
    "a mask and a number": (lambda: masks.Blocks(2) | 3, TypeError, "join masks of indices"),
    "top k and a pattern": (lambda: masks.Blocks(2) & masks.TopK(1), TypeError, "as `among`"),
    "groups of 12": (lambda: masks.Hierarchical(12), ValueError, "got 12. Take 8 or 16"),
    "a window of groups": (
        lambda: attend(masks.Hierarchical(2), window=3),
        ValueError,
        "takes no window, .* got window=3",
    ),
    "a mask for cuDNN": (
        lambda: attend(masks.Blocks(2), backend="cudnn"),
        NotImplementedError,
        "masks are for reference and blocked. Leave backend None",
    ),
    "a mask of a field": (lambda: jf.SelfAttention(mask=3), TypeError, "mask must be an instance"),
    "linear attention masked": (lambda: masked(jf.Linear()), NotImplementedError, "Use Softmax"),
    "Sinkhorn masked": (lambda: masked(jf.Sinkhorn()), NotImplementedError, "Use Softmax"),
    "hardmax of the top": (
        lambda: masked(jf.Hardmax(), masks.TopK(2)),
        NotImplementedError,
        "take patterns as masks",
    ),
    "keys kept for a mask": (
        lambda: jf.SelfAttention(mask=masks.Blocks(2)).attend(0.0, MU.points[:1], MU.points, 0),
        NotImplementedError,
        "cache=False",
    ),
    "entropy of the top": (
        lambda: observables.attention_entropy(jf.SelfAttention(mask=masks.TopK(2)), MU),
        NotImplementedError,
        "attention_matrix",
    ),
    # maps of the literature
    "tokens that are not normalised": (
        lambda: jf.flow(FLAT, MU, t1=1.0, dt0=0.1, solver=jf.solvers.NormalisedEuler()),
        ValueError,
        r"of a field on Euclidean\(\) are not: give the field geometry=jaxflow.Sphere\(\)",
    ),
    "retracted elsewhere": (
        lambda: jf.flow(
            FLAT, MU, t1=1.0, dt0=0.1, solver=jf.solvers.Retracted(diffrax.Euler(), jf.Sphere())
        ),
        ValueError,
        r"of the field, Euclidean\(\); got Retracted on Sphere.*Pass Euler\(\) alone",
    ),
    "retracted elsewhere, in parts": (
        lambda: jf.flow(
            FLAT,
            MU,
            t1=1.0,
            dt0=0.1,
            solver=jf.solvers.LieTrotter(jf.solvers.Retracted(diffrax.Euler(), jf.Sphere())),
        ),
        ValueError,
        "on the geometry of the field",
    ),
    "biases without an order": (
        lambda: jf.SelfAttention(interaction=jf.ALiBi(0.5)),
        ValueError,
        "pass causal=True",
    ),
    "slopes of other heads": (
        lambda: jf.MultiHeadAttention(
            8, 4, interaction=jf.ALiBi([0.5, 0.25]), causal=True, key=KEY
        ),
        ValueError,
        r"one number a head, shape \(4,\); got \(2,\)",
    ),
    "slopes of no head": (
        lambda: jf.SelfAttention(interaction=jf.ALiBi([0.5, 0.25]), causal=True)(
            0.0, MU.points, MU
        ),
        ValueError,
        "2 slopes are those of as many heads",
    ),
    "a table of slopes": (lambda: jf.ALiBi(np.eye(2)), ValueError, r"one a head, shape \(H,\)"),
    "a sigmoid of nan": (lambda: jf.Sigmoid(NAN), ValueError, "bias must be finite, got nan"),
    "sigmoid attention masked": (
        lambda: masked(jf.Sigmoid(), masks.TopK(2)),
        NotImplementedError,
        "take patterns as masks",
    ),
    "sigmoid attention compressed": (
        lambda: jf.Compressed(jf.SelfAttention(interaction=jf.Sigmoid())),
        ValueError,
        "Sigmoid is no integral of exp",
    ),
    "a function compressed": (
        lambda: jf.Compressed(jf.SelfAttention(query=jnp.sin)),
        ValueError,
        "compress attention with matrices",
    ),
    "a function rescaled": (
        lambda: jf.Rescaled(jf.SelfAttention(value=jnp.sin, geometry=jf.Euclidean())),
        ValueError,
        "matrices or None, got functions",
    ),
    "a vector for a matrix": (
        lambda: jf.SelfAttention(query=[1.0, 2.0]),
        ValueError,
        r"query must be a matrix, or a function of a token; got shape \(2,\)",
    ),
    "no bandwidth": (lambda: jf.MeanShift(0.0), ValueError, "beta must be positive"),
    "no confidence": (lambda: jf.BoundedConfidence(-1.0), ValueError, "radius must be positive"),
    "a D that is not symmetric": (
        lambda: jf.fields.weighted_attention([[1.0, 2.0], [0.0, 1.0]]),
        ValueError,
        "D must be symmetric.*take SelfAttention",
    ),
    "an energy of vectors": (
        lambda: observables.InteractionEnergy(1.0, query=[1.0, 2.0]),
        ValueError,
        r"query must be a matrix \(p, d\), or None; got shape \(2,\)",
    ),
    "softmax among leaders": (
        lambda: jf.hardmax_flow(FLAT, MU, t1=1.0),
        ValueError,
        "takes SelfAttention.*got SelfAttention on Euclidean.*Take jaxflow.flow",
    ),
    "times beyond the end": (
        lambda: jf.hardmax_flow(LEADERS, MU, t1=1.0, ts=[0.5, 2.0]),
        ValueError,
        "within .0, t1",
    ),
    "leaders that change too often": (
        lambda: jf.hardmax_flow(
            jf.LinearDrift(np.diag([0.0, 0.3])) + 0.0 * LEADERS,
            jf.Measure(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.5]])),
            t1=4.0,
            max_events=0,
        ),
        RuntimeError,
        "more than max_events = 0 times up to t = 1.155.* of 4. Raise it",
    ),
    "a rank above d": (
        lambda: jf.fields.GaussianMatrices(rank=4)(3, key=KEY),
        ValueError,
        "at most d = 3, got rank=4",
    ),
    "no rank": (lambda: jf.fields.GaussianMatrices(rank=0), ValueError, "rank must be at least 1"),
    "a B that is not square": (
        lambda: jf.fields.SignedValue(np.ones((2, 3))),
        ValueError,
        r"a matrix \(d, d\), got shape \(2, 3\)",
    ),
    "a B of another size": (
        lambda: jf.fields.SignedValue(np.eye(2))(3, key=KEY),
        ValueError,
        "acts on no tokens of dimension 3",
    ),
    "a layer without an end": (
        lambda: jf.fields.redrawn(lambda key: FLAT, [0.0], key=KEY),
        ValueError,
        "two edges at least",
    ),
    "matrices for a law": (
        lambda: jf.phase_diagram([1.0], [1.0], n=4, d=3, matrices=np.eye(3), key=KEY),
        TypeError,
        r"such as jaxflow.fields.GaussianMatrices\(rank=2\)",
    ),
    "rescaled on the sphere": (
        lambda: jf.Rescaled(jf.SelfAttention()),
        ValueError,
        r"pass geometry=jaxflow.Euclidean\(\)",
    ),
    "a rescaled drift": (lambda: jf.Rescaled(jf.LinearDrift(1.0)), TypeError, "attention must be"),
    # pictures
    "a picture of nothing": (lambda: viz.summary(None), TypeError, "sol must be"),
    "a number for a path": (lambda: viz.film(None, 3), TypeError, "path must be"),
    "a tree of nothing": (lambda: viz.merge_tree(None), TypeError, "tree must be"),
    "a list for a point": (lambda: jf.Sphere().retract([1.0, 0.0]), TypeError, "must be arrays"),
    # measures
    "points of text": (lambda: jf.Measure("abc"), TypeError, "points must be an array"),
    "rows of unequal lengths": (lambda: jf.Measure([[1.0, 2.0], [3.0]]), TypeError, "points must"),
    "integer points": (lambda: jf.Measure([[1, 2]]), TypeError, "floating point"),
    "no mass": (lambda: jf.Measure(MU.points, jnp.full(4, -INF)), ValueError, "some mass"),
    "one system without mass": (
        lambda: jf.Measure(MU.points[None], jnp.full((1, 4), -INF)),
        ValueError,
        "some mass",
    ),
    "a weight of nan": (lambda: jf.Measure(MU.points, [0.0, NAN, 0, 0]), ValueError, "or -inf"),
    "infinite mass": (lambda: jf.Measure(MU.points, [0.0, INF, 0, 0]), ValueError, "or -inf"),
    "an index beyond": (lambda: jf.Measure(MU.points[None])[np.array([3])], IndexError, "range"),
    "a traced index's kind": (lambda: jf.Measure(MU.points[None])["a"], IndexError, "integers"),
    "no function": (lambda: MU.expectation(3), TypeError, "must be a function"),
    "two values": (lambda: MU.expectation(lambda x: (x, x)), TypeError, "one array"),
    "half a token": (
        lambda: measure.uniform_sphere(2.5, 3, key=KEY),
        TypeError,
        "n must be a whole",
    ),
    "no token": (lambda: measure.circle(0), ValueError, "n must be at least 1, got 0"),
    "no key": (lambda: measure.uniform_sphere(4, 3, key=None), TypeError, r"jax.random.key\(0\)"),
    "a seed for a key": (lambda: measure.gaussian(4, 3, key=0), TypeError, r"jax.random.key\(0\)"),
    "no radius": (
        lambda: measure.uniform_sphere(4, 3, key=KEY, radius=0.0),
        ValueError,
        "positive",
    ),
    "a variance below 0": (
        lambda: measure.gaussian(4, 3, key=KEY, covariance=-1.0),
        ValueError,
        "at least 0",
    ),
    "no covariance": (
        lambda: measure.gaussian(4, 2, key=KEY, covariance=[[1.0, 2.0], [2.0, 1.0]]),
        ValueError,
        "positive definite",
    ),
    "a mean of another size": (
        lambda: measure.gaussian(4, 3, key=KEY, mean=[1.0]),
        ValueError,
        "mean must",
    ),
    "no direction": (
        lambda: measure.von_mises_fisher(4, [0.0, 0.0], 1.0, key=KEY),
        ValueError,
        "direction",
    ),
    "a direction of nan": (
        lambda: measure.von_mises_fisher(4, [NAN, 0.0], 1.0, key=KEY),
        ValueError,
        "finite",
    ),
    "one dimension": (
        lambda: measure.von_mises_fisher(4, [1.0], 1.0, key=KEY),
        ValueError,
        "d >= 2",
    ),
    "infinite concentration": (
        lambda: measure.von_mises_fisher(4, [1.0, 0], INF, key=KEY),
        ValueError,
        "1e30",
    ),
    "negative concentration": (
        lambda: measure.von_mises_fisher(4, [1.0, 0], -1.0, key=KEY),
        ValueError,
        "-mean",
    ),
    "a phase of nan": (lambda: measure.circle(4, phase=NAN), ValueError, "phase must be finite"),
    "angles of inf": (lambda: measure.from_angles([INF]), ValueError, "angles must be finite"),
    "no text": (lambda: measure.from_text(None, 4, key=KEY), TypeError, "text must"),
    "fewer than no tokens": (
        lambda: measure.from_text("a b", 4, key=KEY, max_tokens=-1),
        ValueError,
        "max_tokens",
    ),
    "text in one dimension": (lambda: measure.from_text("a", 1, key=KEY), ValueError, "at least 2"),
    "a pixel of nan": (
        lambda: measure.from_image([[1.0, NAN]], 1),
        ValueError,
        r"got nan at index \(0, 1",
    ),
    "no channels": (lambda: measure.from_image(np.ones((4, 4, 0)), 2), ValueError, "multiples"),
    "complex pixels": (lambda: measure.from_image(1j * np.ones((2, 2)), 1), TypeError, "real"),
    # sizes
    "a measure beyond memory": (
        lambda: measure.uniform_sphere(10**9, 10**4, key=KEY),
        MemoryError,
        "fewer tokens",
    ),
    "a text beyond memory": (
        lambda: measure.from_text("a b", 10**10 // 8, key=KEY),
        MemoryError,
        "fewer tokens",
    ),
    "a simplex beyond memory": (lambda: measure.simplex(10**6, 10**6), MemoryError, "fewer tokens"),
    "a model beyond memory": (
        lambda: language_model(vocab_size=10**9, dim=10**4),
        MemoryError,
        "smaller vocabulary",
    ),
    "layers beyond memory": (lambda: language_model(layers=10**9), MemoryError, "fewer layers"),
    "a bound of sizes": (lambda: measure.circle(10**30), ValueError, "below 2"),
    # geometries
    "a radius of text": (lambda: jf.Sphere("a"), TypeError, "real number"),
    "an infinite gain": (lambda: jf.Ellipsoid(np.array([1.0, INF, 1.0])), ValueError, "finite"),
    "a bias of nan": (lambda: jf.Ellipsoid(np.ones(3), np.full(3, NAN)), ValueError, "finite"),
    "shapes that differ": (
        lambda: jf.Sphere().project(MU.points, MU.points[:2]),
        ValueError,
        "one shape",
    ),
    "a token of another space": (
        lambda: jf.Ellipsoid(np.ones(3)).retract(jnp.ones((2, 4))),
        ValueError,
        "d = 3",
    ),
    # observables
    "an array for a measure": (
        lambda: observables.diameter(MU.points),
        TypeError,
        r"jaxflow.Measure\(points\)",
    ),
    "a threshold of text": (lambda: observables.cluster_count(MU, "a"), TypeError, "threshold"),
    "two thresholds": (lambda: observables.cluster_count(MU, [0.1, 0.2]), TypeError, "threshold"),
    "no cosine": (lambda: observables.ClusterCount(2.0), ValueError, "threshold must be a cosine"),
    "an energy at 0": (lambda: observables.InteractionEnergy(0.0), ValueError, "beta must"),
    "half a probe": (
        lambda: observables.attention_spectrum(jf.SelfAttention(), MU, probes=2.5),
        TypeError,
        "probes",
    ),
    "a rank above 1": (
        lambda: observables.AttentionRank(jf.SelfAttention(), tolerance=2.0),
        ValueError,
        "tolerance",
    ),
    "no attention": (
        lambda: observables.attention_matrix(jf.FeedForward(3, 4, key=KEY), MU),
        TypeError,
        "one matrix A",
    ),
    "queries of another size": (
        lambda: observables.attention_matrix(jf.SelfAttention(), MU, jnp.ones((2, 5))),
        ValueError,
        "queries x",
    ),
    "an infinite epsilon": (
        lambda: observables.sinkhorn_divergence(MU, MU, epsilon=INF),
        ValueError,
        "epsilon must",
    ),
    "no iterations": (
        lambda: observables.sinkhorn_divergence(MU, MU, epsilon=1.0, max_iterations=0),
        ValueError,
        "max_iterations",
    ),
    "modes beyond 32 bits": (
        lambda: observables.fourier_modes(measure.circle(2), np.array(2**40)),
        TypeError,
        "k must",
    ),
    "edges of nan": (
        lambda: observables.pair_correlations(MU, [0.0, NAN]),
        ValueError,
        "edges must be finite",
    ),
    "times of text": (
        lambda: observables.merge_tree("a", jf.Measure(MU.points[None])),
        TypeError,
        "ts must be",
    ),
    "hardmax beyond memory": (
        lambda: observables.column_defect(
            jf.SelfAttention(interaction=jf.Hardmax()), jf.Measure(jnp.zeros((10**6, 1)))
        ),
        MemoryError,
        "softmax attention",
    ),
    # densities
    "probes of another dimension": (
        lambda: log_density(np.eye(2)),
        ValueError,
        r"x0 must have shape \(m, 3\), .*; got \(2, 2\)",
    ),
    "probes off the sphere": (lambda: log_density(2 * MU.points), ValueError, "Retract it first"),
    "a probe of nan": (lambda: log_density(np.full((4, 3), NAN)), ValueError, "x0 must be finite"),
    "a density for each coordinate": (
        lambda: log_density(log_rho0=lambda x: jnp.log(x)),
        ValueError,
        r"one number a point, shape \(3,\), or a function",
    ),
    "an infinite density": (lambda: log_density(log_rho0=np.full(3, INF)), ValueError, "or -inf"),
    "a whole density": (lambda: log_density(log_rho0=np.zeros(3, int)), TypeError, "Cast it first"),
    "a seed for probes": (lambda: log_density(key=0), TypeError, r"jax.random.key\(0\)"),
    "no probes": (
        lambda: log_density(key=KEY, samples=0),
        ValueError,
        "samples must be at least 1, got 0",
    ),
    "several systems": (
        lambda: jf.log_density(
            jf.SelfAttention(), jf.Measure(MU.points[None]), MU.points, np.zeros(4), t1=1.0
        ),
        ValueError,
        "jax.vmap it over several",
    ),
    "a number for a grid": (lambda: solve(grid=8), TypeError, r"jaxflow.density.Circle\(128\)"),
    "a field of another space": (
        lambda: solve(jf.LinearDrift(1.0)),
        ValueError,
        r"Circle is a grid of Sphere.*Pass geometry=jaxflow.Sphere",
    ),
    "a sphere of another size": (
        lambda: solve(jf.SelfAttention(geometry=jf.Sphere(2.0))),
        ValueError,
        "lives on Sphere",
    ),
    "a density below 0": (
        lambda: solve(rho0=lambda x: x[0]),
        ValueError,
        "finite and not negative; got -",
    ),
    "a density of another grid": (lambda: solve(rho0=np.ones(9)), ValueError, r"shape \(8,\), or"),
    "no density": (lambda: solve(rho0=np.zeros(8)), ValueError, "must have some mass"),
    "negative noise": (lambda: solve(kappa=-1.0), ValueError, "kappa must be positive"),
    "a solver by name": (
        lambda: solve(solver="Tsit5"),
        TypeError,
        "instance such as diffrax.Tsit5",
    ),
    "nothing that is implicit": (
        lambda: solve(solver=diffrax.KenCarp4()),
        ValueError,
        "without kappa there is none",
    ),
    "a masked field of a density": (
        lambda: solve(jf.SelfAttention(causal=True)),
        ValueError,
        "causal=True",
    ),
    "a function to save of a density": (
        lambda: solve(saveat=diffrax.SaveAt(t1=True, fn=lambda t, y, args: y)),
        ValueError,
        "a solve saves densities",
    ),
    "three cells": (lambda: density.Circle(3), ValueError, "n must be at least 4, got 3"),
    "a grid inside out": (
        lambda: density.Box(1.0, -1.0, 8),
        ValueError,
        r"low < high and cells.*got low=\(1.0,\)",
    ),
    "a box of two shapes": (
        lambda: density.Box((0.0, 0.0), (1.0, 1.0), 8),
        ValueError,
        "one number a coordinate",
    ),
    "no degree": (lambda: density.SphereHarmonics(0), ValueError, "degree must be at least 1"),
    "an order parameter of 1": (lambda: evolve([1.0, 0.0]), ValueError, r"\|z\| < 1; got"),
    "a cosine of 2": (
        lambda: evolve(2.0, closures.TwoTokens(1.0)),
        ValueError,
        "from -1 to 1, the cosine",
    ),
    "five tokens too far apart": (
        lambda: evolve(-0.5, closures.Equiangular(5, 1.0)),
        ValueError,
        "from -0.25 to 1",
    ),
    "a measure for moments": (
        lambda: evolve(MU, closures.SoftmaxGaussian(np.eye(2), np.eye(2))),
        TypeError,
        r"closures.Moments\(mean, covariance\)",
    ),
    "no covariance of a law": (
        lambda: evolve(
            closures.Moments(np.zeros(2), -np.eye(2)),
            closures.SoftmaxGaussian(np.eye(2), np.eye(2)),
        ),
        ValueError,
        "positive definite, got",
    ),
    "a closure of hardmax": (
        lambda: closures.gaussian(
            jf.SelfAttention(interaction=jf.Hardmax(), geometry=jf.Euclidean()), 2
        ),
        TypeError,
        "keeps no Gaussian law: pass Softmax",
    ),
    "Gaussian laws on the sphere": (
        lambda: closures.gaussian(jf.SelfAttention(), 2),
        ValueError,
        "geometry=jaxflow.Euclidean",
    ),
    "a closure of hardmax tokens": (
        lambda: closures.Equiangular(4, 1.0, jf.Hardmax()),
        TypeError,
        "interaction must be an instance",
    ),
    # models
    "a token beyond": (
        lambda: language_model()(jnp.array([500])),
        ValueError,
        "in 0, ..., 10, got 500",
    ),
    "a token below": (lambda: language_model()(jnp.array([1, -1])), ValueError, "got -1 to 1"),
    "a token that would wrap": (
        lambda: language_model()(np.array([2**32 + 5])),
        TypeError,
        "within int32",
    ),
    "a token and a half": (
        lambda: language_model()(jnp.array([1.5])),
        TypeError,
        "must be integers",
    ),
    "half a head": (lambda: language_model(heads=0.5), TypeError, "heads must be a whole number"),
    "an activation by name": (
        lambda: language_model(activation="gelu"),
        TypeError,
        "activation must be a function",
    ),
    "a curve by name": (
        lambda: language_model(curve="layers"),
        TypeError,
        "curve must be a function",
    ),
    "a depth of 3": (lambda: language_model(depth=3), TypeError, "depth must be"),
    "a depth of text": (lambda: models.Depth(t1="a", steps=1), TypeError, "depth t1"),
    "half a step": (lambda: models.Depth(t1=1.0, steps=2.5), TypeError, "steps must be a whole"),
    "a solver's class": (
        lambda: models.Depth(t1=1.0, steps=1, solver=diffrax.Euler),
        TypeError,
        "solver",
    ),
    "pixels of 8 bits": (
        lambda: models.ImageClassifier((4, 4, 1), 2, 8, 2, 1, patch=2, key=KEY)(
            np.ones((4, 4, 1), np.uint8)
        ),
        TypeError,
        "x / 255",
    ),
    "a configuration that is a list": (lambda: models.build([1]), TypeError, "configuration must"),
    "a missing size": (
        lambda: models.build({"model": "ResidualNetwork"}),
        ValueError,
        "needs inputs, outputs",
    ),
    "an unknown key": (lambda: build(zz=1), ValueError, "takes no argument zz, but inputs"),
    "a seed of 20 digits": (lambda: build(seed=10**20), ValueError, "seed must be below"),
    "a depth without t1": (lambda: build(depth={"steps": 1}), ValueError, "depth needs t1"),
    "a block by name": (
        lambda: language_model(block="llama"),
        TypeError,
        "block must be a function of a PRNG key",
    ),
    "a number as config": (lambda: fit(config=3), TypeError, "config must be a dictionary, got 3"),
    "a number as run": (lambda: fit(run=3), TypeError, "run must be a path, .* got 3"),
    "a number as profile": (lambda: fit(profile=3), TypeError, "profile must be a path, .* got 3"),
    "a run that is a number": (lambda: training.load(3), TypeError, "path must be a path"),
    "an export of a number": (
        lambda: training.export(3, "model.safetensors"),
        TypeError,
        "run, if it is no model, must be a path",
    ),
    "a solver in a list": (
        lambda: build(depth={"t1": 1, "solver": [1]}),
        ValueError,
        "solver must be one of",
    ),
}


def outcome(call) -> list[str]:
    try:
        return ["nothing", repr(call())]
    except Exception as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    json.dump({name: outcome(call) for name, (call, *_) in CALLS.items()}, sys.stdout)
