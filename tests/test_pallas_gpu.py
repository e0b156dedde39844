"""The kernels for NVIDIA GPUs: lowering and choice anywhere, values on a device where there is one.

Their conformance in Pallas's interpreter is part of test_expectation.py; here is what it leaves
out: the Mosaic GPU form of the particles' kernels, which has an interpreter of its own.
"""

import dataclasses
import importlib.util
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxflow import Measure, MultiHeadAttention
from jaxflow.kernels import (
    cudnn,
    describe_backend,
    pallas_gpu,
    select_backend,
    softmax_expectation,
)
from jaxflow.kernels.base import MODES, Cotangent, Forward, Problem, Shapes, Tangent, evaluate
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.cudnn import CuDNN
from jaxflow.kernels.pallas_gpu import particles, tensor_cores
from jaxflow.kernels.pallas_gpu.particles import Particles

CAUSAL = (None, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    dtype: str
    n: int
    d: int
    batch: int = 1
    causal: bool = False
    weighted: bool = False
    device: str = "NVIDIA H100 80GB HBM3"

    def __str__(self):
        masks = "-causal" * self.causal + "-weighted" * self.weighted
        sizes = f"{self.batch}-{self.n}-{self.d}"
        return f"{self.family}-{self.dtype}-{sizes}{masks}-{self.device[7:11]}"

    @property
    def mosaic(self):
        return self.family != "tensor_cores" and "H100" in self.device

    def operands(self):
        rng = np.random.default_rng(self.n + self.d)
        q, k, v = rng.standard_normal((3, self.batch, self.n, self.d), np.float32)
        return *(jnp.asarray(a, self.dtype) for a in (q, k, v)), jnp.asarray(k[..., 0])

    def call(self, backend=None):
        def fn(q, k, v, b):
            options = {"scale": self.d**-0.5, "causal": self.causal, "backend": backend}
            return softmax_expectation(q, k, v, b if self.weighted else None, **options)

        return jax.vmap(fn)


A100 = "NVIDIA A100-SXM4-80GB"
CASES = [
    Case("particles", "float32", 20000, 3, weighted=True),
    Case("particles", "float32", 4096, 16, batch=2),
    Case("particles", "float32", 4096, 3, device=A100),
    Case("hopper", "bfloat16", 4096, 64, batch=8, causal=True),
    Case("hopper", "float16", 4096, 128, batch=2, weighted=True),
    Case("tensor_cores", "float32", 2048, 64, batch=2, causal=True),
    Case("tensor_cores", "bfloat16", 2048, 64, batch=2, causal=True, device=A100),
    Case("tensor_cores", "float16", 1000, 128, weighted=True, device=A100),
    Case("tensor_cores", "bfloat16", 2048, 256, device=A100),
    Case("tensor_cores", "bfloat16", 777, 20, causal=True),
    Case("tensor_cores", "float32", 512, 256, weighted=True),
]


def derivatives(fn, operands):
    """The forward, tangent and cotangent of the operation, with a cotangent for both results."""
    directions = tuple(jnp.cos(a) for a in operands)
    outs, moved = jax.jvp(fn, operands, directions)
    pulled = jax.vjp(fn, *operands)[1](tuple(jnp.sin(o) for o in outs))
    return outs, moved, pulled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowers_for_cuda(case, abstract_device):
    """One program for the forward, tangent and cotangent kernels, on a machine without a GPU."""
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), case.operands())
    with abstract_device(case.device):
        traced = jax.jit(lambda *a: derivatives(case.call(), a)).trace(*operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == case.mosaic
    assert ("xla.gpu.triton" in text) != case.mosaic


@pytest.mark.parametrize("case", CASES, ids=str)
def test_family(case):
    problem = Problem(band=CAUSAL if case.causal else (None, None), weighted=case.weighted)
    capability = (9, 0) if "H100" in case.device else (8, 0)
    shapes = Shapes(*[jax.ShapeDtypeStruct((case.n, case.d), case.dtype)] * 3)
    assert pallas_gpu.family(shapes, problem, capability).name == case.family


def test_selection_by_platform():
    few, heads = jnp.zeros((64, 3)), jnp.zeros((64, 64), jnp.bfloat16)
    double = np.zeros((64, 3))
    assert select_backend(few, few, few, platform="cuda") == "pallas_gpu"
    assert select_backend(heads, heads, heads, platform="cuda", mode="tangent") != "blocked"
    assert select_backend(double, double, double, platform="cuda") == "blocked"
    assert select_backend(few, few, few, platform="cpu") == "blocked"
    assert describe_backend(few, few, few, platform="cuda") == "pallas_gpu (particles)"
    assert describe_backend(heads, heads, heads, platform="gpu") == "pallas_gpu (hopper)"
    assert describe_backend(few, few, few, platform="tpu") == "pallas_tpu (on Mosaic TPU)"
    with pytest.raises(NotImplementedError, match=r"'pallas_gpu'.*float32.*got float64.*None"):
        select_backend(double, double, double, platform="cuda", backend="pallas_gpu")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a device")
def test_a_named_backend_does_not_fall_back():
    x = jnp.zeros((64, 3))
    with pytest.raises(NotImplementedError, match="runs on cuda.*compiled for cpu.*interpret"):
        softmax_expectation(x, x, x, backend="pallas_gpu")
    wide = jnp.zeros((4, 300))
    with pytest.raises(NotImplementedError, match="at most 256 channels, got 300"):
        softmax_expectation(wide, wide, wide, backend="pallas_gpu")


@pytest.mark.parametrize(
    "kind, capability",
    [
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Tesla T4", (7, 5)),
        (A100, (8, 0)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA H200", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA GB200", (10, 0)),
        ("NVIDIA GeForce RTX 5090", (12, 0)),
        ("NVIDIA RTX 5000 Ada Generation", (8, 6)),
    ],
)
def test_the_capability_of_a_named_device(kind, capability, abstract_device):
    with abstract_device(kind):
        assert pallas_gpu.compute_capability() == capability


def test_the_device_at_hand_tells_its_capability(abstract_device, monkeypatch):
    """Also under a mesh, which names it; another device that is named counts by its name."""
    device = types.SimpleNamespace(device_kind="NVIDIA Tomorrow", compute_capability="11.3")
    monkeypatch.setattr(pallas_gpu, "_local_device", lambda: device)
    assert pallas_gpu.compute_capability() == (11, 3)
    with abstract_device("NVIDIA Tomorrow"):
        assert pallas_gpu.compute_capability() == (11, 3)
    with abstract_device(A100):
        assert pallas_gpu.compute_capability() == (8, 0)


def test_before_ampere_it_falls_back(abstract_device):
    x = jnp.zeros((64, 3))
    with abstract_device("Tesla T4"):
        assert select_backend(x, x, x, platform="cuda") == "blocked"
        text = jax.jit(lambda x: softmax_expectation(x, x, x)).trace(x)
        text = text.lower(lowering_platforms=("cuda",)).as_text()
        with pytest.raises(NotImplementedError, match=r"compute capability 8.0, got 7.5"):
            select_backend(x, x, x, platform="cuda", backend="pallas_gpu")
    assert "triton" not in text and "mosaic" not in text


def test_without_triton_it_falls_back(abstract_device, monkeypatch):
    few, heads = jnp.zeros((64, 3)), jnp.zeros((64, 64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with abstract_device("NVIDIA H100 80GB HBM3"):
        assert select_backend(few, few, few, platform="cuda") == "pallas_gpu"
        assert select_backend(heads, heads, heads, platform="cuda") == "blocked"
        with pytest.raises(NotImplementedError, match="need Pallas on Triton"):
            select_backend(heads, heads, heads, platform="cuda", backend="pallas_gpu")


@pytest.mark.parametrize("capability, rows", [((8, 0), 64), ((8, 9), 32)], ids=str)
def test_tiles_of_a_small_shared_memory(capability, rows):
    q = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    family = pallas_gpu.family(Shapes(q, q, q), Problem(), capability)
    assert isinstance(family, tensor_cores.TensorCores)
    small = family.small_memory
    tile = tensor_cores.default_config("gu", 512, 512, 256, q.dtype, small_memory=small)
    assert tile.rows == rows


# ------------------------------------------------------------------ Mosaic GPU, interpreted


@pytest.fixture
def interpreter():
    if public := getattr(plgpu, "InterpretGPUParams", None):
        return public(detect_races=True)
    # JAX 0.10 has it, but not in a public place yet.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2048, 2560])
def test_particles_in_segments(n):
    """2,560 columns are three segments of 1,024: the last one's padding must weigh nothing, though
    2,560 is a whole number of copies into shared memory."""
    rng = np.random.default_rng(n)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v, g = normal(1, 64, 3), normal(1, n, 3), normal(1, n, 2), normal(1, 64, 2)
    problem, tall = Problem(weighted=False), particles.Config(rows=64, keys=64)
    kernels = Particles(mosaic=False, config=tall, interpret=True)
    forward = Forward(q, k, v, jnp.zeros((1, n)), jnp.ones(1))
    mean, lse = Blocked().forward(forward, problem)
    directions = normal(1, 64, 3), normal(1, n, 3), normal(1, n, 2), forward.b
    tangent = Tangent(*forward, mean, lse, *directions)
    for operands in (forward, tangent, Cotangent(*forward, mean, lse, g, normal(1, 64))):
        found = evaluate(kernels, operands, problem)
        right = evaluate(Blocked(), operands, problem)
        for f, r in zip(found[:3], right[:3], strict=True):
            np.testing.assert_allclose(f, r, rtol=0, atol=1e-5 * float(jnp.abs(r).max()))


@pytest.mark.parametrize("weighted, m, n", [(True, 40, 300), (False, 70, 40), (False, 70, 32)])
def test_particles_on_mosaic(weighted, m, n, interpreter):
    """Several copies, one that is padded, and one without padding, where log-weights are left
    out."""
    p, r = 3, 2
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    q, k, v, b = draw(m, p), draw(n, p), draw(n, r), draw(n) * float(weighted)
    b = b.at[0, 5].set(-jnp.inf) if weighted else b
    # The bound on the scores is safe for the first system, not for the second.
    scale = jnp.array([0.7, 40.0])
    problem = Problem(weighted=weighted)
    kernels = Particles(config=particles.Config(64), interpret=interpreter)
    primal = Forward(q, k, v, b, scale)
    mean, lse = Blocked().forward(primal, problem)
    du, dk, dv, db = draw(m, p), draw(n, p), draw(n, r), draw(n) * float(weighted)
    for operands in (
        primal,
        Tangent(*primal, mean, lse, du, dk, dv, db),
        Cotangent(*primal, mean, lse, draw(m, r), draw(m)),
    ):
        expected = evaluate(Blocked(), operands, problem)
        # Scores reach 400: a float32 is known to 400 * 2^-24 = 2e-5, and so is its exponential.
        shown = len(expected) if weighted else 3  # gb means nothing without weights
        _assert_close(evaluate(kernels, operands, problem)[:shown], expected[:shown], 1e-4)


def _assert_close(found, expected, tolerance):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert np.abs(f - e).max() <= tolerance * (1 + np.abs(e).max())


# ------------------------------------------------------------------ tiles


@pytest.mark.parametrize("band", [(None, None), (None, 0), (5, 3), (None, -2), (3, None)], ids=str)
def test_unmasked_tiles_are_whole(band):
    """Every visible pair is in a visited tile, and no invisible one in an unmasked tile."""
    m, n, config = 80, 112, tensor_cores.Config(16, 8)
    tiles = tensor_cores.Tiles(m, n, band, config, interpret=True)
    left, right = band
    i, j = np.arange(m)[:, None], np.arange(n)[None, :]
    visible = np.ones((m, n), bool)
    visible &= True if left is None else j >= i - left
    visible &= True if right is None else j <= i + right

    def visit(seen, visible, row, column, masked):
        part = np.s_[int(row) : int(row) + config.rows, int(column) : int(column) + config.keys]
        seen[part] += 1
        assert masked or visible[part].all()

    for over, pairs in ((tiles, visible), (tiles.transposed, visible.T)):
        seen = np.zeros(pairs.shape, int)
        with jax.disable_jit():
            for row in range(0, over.m, config.rows):
                step = lambda column, masked, _, at=(seen, pairs, row): visit(
                    at[0], at[1], at[2], column, masked
                )
                over.over_columns(row, step, None)
        assert seen.max() == 1 and (seen[pairs] == 1).all()


# ------------------------------------------------------------------ cuDNN

HEADS = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    "shapes, problem, reason",
    [
        ((HEADS,) * 3, Problem(weighted=False, constant_scale=0.1), None),
        ((HEADS,) * 3, Problem(CAUSAL, weighted=False, constant_scale=0.1), None),
        ((HEADS,) * 3, Problem((7, 0), weighted=False, constant_scale=0.1), None),
        ((HEADS,) * 3, Problem(weighted=True, constant_scale=0.1), "log_weights"),
        ((HEADS,) * 3, Problem(weighted=False), "constant of the program"),
        ((HEADS,) * 3, Problem((7, 7), weighted=False, constant_scale=1.0), "causal ones"),
        ((HEADS.update(dtype=jnp.float32),) * 3, Problem(), "bfloat16 and float16, got float32"),
        (
            (HEADS.update(shape=(9, 20)),) * 3,
            Problem(weighted=False, constant_scale=1.0),
            "multiples of 8",
        ),
    ],
)
def test_cudnn_refuses_by_name(shapes, problem, reason, monkeypatch):
    monkeypatch.setattr(cudnn, "_absent", lambda head_dimension: None)
    for mode in MODES:
        found = CuDNN().refusal(mode, Shapes(*shapes), problem)
        assert found is None if reason is None else reason in found


def test_what_cudnn_has_not_is_what_the_other_kernels_have(abstract_device, monkeypatch):
    """The tangent, and the cotangent of a log-partition: refused where they need a lost Triton."""
    monkeypatch.setattr(cudnn, "_absent", lambda head_dimension: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = Problem(weighted=False, constant_scale=0.1)
    mean_only = dataclasses.replace(problem, mean_only=True)
    with abstract_device(A100):
        refusal = lambda mode, problem: CuDNN().refusal(mode, Shapes(*[HEADS] * 3), problem)
        assert refusal("forward", problem) is None
        assert refusal("cotangent", mean_only) is None
        assert "Triton" in (refusal("tangent", problem) or "")
        assert "Triton" in (refusal("cotangent", problem) or "")
        options = {"scale": 0.1, "platform": "cuda"}
        assert select_backend(*[HEADS] * 3, **options) == "cudnn"
        assert describe_backend(*[HEADS] * 3, **options) == "cudnn (its fused attention)"
        assert select_backend(*[HEADS] * 3, mode="tangent", **options) == "blocked"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a device")
def test_cudnn_needs_a_device():
    with pytest.raises(NotImplementedError, match="'cudnn'.*no CUDA device"):
        softmax_expectation(*[jnp.zeros((8, 64), jnp.bfloat16)] * 3, backend="cudnn")


def test_cudnn_runs_the_attention_of_models(monkeypatch):
    """Its scale is a Python number where beta is not a parameter."""
    scales = []

    def forward(self, operands, problem):
        scales.append(problem.constant_scale)
        return Blocked().forward(operands, problem)

    monkeypatch.setattr(cudnn, "_absent", lambda head_dimension: None)
    monkeypatch.setattr(CuDNN, "forward", forward)
    field = MultiHeadAttention(128, 2, causal=True, key=jax.random.key(0))
    x = jnp.zeros((32, 128), jnp.bfloat16)
    traced = jax.jit(lambda x: field(0.0, x, Measure(x))).trace(x)
    traced.lower(lowering_platforms=("cuda",))
    assert scales == [1 / 8]


# ------------------------------------------------------------------ on a device


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pallas_gpu", "cudnn", None])
@pytest.mark.parametrize("case", [c for c in CASES if c.device != A100], ids=str)
def test_against_blocked_on_the_device(case, backend):
    operands = case.operands()
    try:
        found = jax.jit(lambda *a: derivatives(case.call(backend), a))(*operands)
    except NotImplementedError as e:
        assert backend == "cudnn"
        pytest.skip(str(e))
    exact = tuple(a.astype(jnp.float32) for a in operands)
    expected = jax.jit(lambda *a: derivatives(case.call("blocked"), a))(*exact)
    _agree(found, expected, case.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pallas_gpu", "cudnn", None])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "dtype, m, n, p, r",
    [
        ("float32", 70, 300, 3, 2),
        ("float32", 1, 300, 3, 3),
        ("float32", 300, 1, 3, 3),
        ("float32", 200, 200, 16, 80),
        ("bfloat16", 200, 200, 16, 16),
        ("bfloat16", 200, 200, 80, 80),
        ("bfloat16", 200, 200, 256, 256),
        ("bfloat16", 200, 200, 32, 64),
        ("bfloat16", 200, 200, 3, 5),
        ("bfloat16", 1, 200, 64, 64),
        ("bfloat16", 200, 1, 64, 64),
        ("float16", 300, 300, 128, 128),
    ],
)
def test_shapes_on_the_device(dtype, m, n, p, r, causal, backend):
    """All derivatives, and the pullback of the mean alone, which cuDNN has a kernel for."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape), np.float32), dtype)
    operands = draw(m, p), draw(n, p), draw(n, r)

    def run(backend, *operands):
        options = {"scale": p**-0.5, "causal": causal, "backend": backend}
        fn = jax.vmap(lambda q, k, v: softmax_expectation(q, k, v, **options))
        mean, pull = jax.vjp(lambda *a: fn(*a)[0], *operands)
        return derivatives(fn, operands), pull(jnp.cos(mean))

    try:
        found = jax.jit(partial(run, backend))(*operands)
    except NotImplementedError as e:
        assert backend == "cudnn"
        pytest.skip(str(e))
    exact = tuple(a.astype(jnp.float32) for a in operands)
    # The weight of one key is constant, and terms of the size of a value cancel in derivatives.
    least = r**0.5 if n == 1 or (m == 1 and causal) else 0.0
    _agree(found, jax.jit(partial(run, "blocked"))(*exact), dtype, least)


def _agree(found, expected, dtype, least=0.0):
    # Rounding of the operands between two products, relative to the largest entry; float32 sums of
    # 20,000 terms, or products of three TF32 parts.
    tolerance = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert np.isfinite(f).all()
        assert np.abs(f - e).max() <= tolerance * max(np.abs(e).max(), least)
