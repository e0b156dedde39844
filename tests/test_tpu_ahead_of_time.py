"""The TPU kernels and whole programs, compiled for chips that need not be there: `make aot-tpu`."""

import importlib.util
import os
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxflow
from benchmarks.machine_code import without_cache
from jaxflow.models import LanguageModel

LIBRARY = importlib.util.find_spec("libtpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LIBRARY is None, reason="libtpu not installed: `make aot-tpu` does"),
]
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1"}
# What libtpu asks of a machine before it describes another.
MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@pytest.fixture(scope="module", autouse=True)
def machine():
    assert LIBRARY is not None and LIBRARY.submodule_search_locations
    library = os.path.join(LIBRARY.submodule_search_locations[0], "libtpu.so")
    os.environ.update({"TPU_LIBRARY_PATH": library} | MACHINE)


def compiled(fn, *args, chips: str, over: int = 1) -> str:
    """The program for one chip, or for four with the first axis of all arguments divided."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chips]).devices
    if over == 1:
        sharding = SingleDeviceSharding(devices[0])
    else:
        mesh = Mesh(np.array(devices[:over]), ("chips",))
        sharding = NamedSharding(mesh, PartitionSpec("chips"))
    jitted = jax.jit(fn, in_shardings=sharding, out_shardings=sharding)
    lowered = jitted.trace(*args).lower(lowering_platforms=("tpu",))
    with without_cache():
        return lowered.compile().as_text() or ""


def attend(x):
    return jax.vmap(lambda x: jaxflow.softmax_expectation(x, x, x, scale=0.125)[0])(x)


MODES = {
    "forward": attend,
    "tangent": lambda x: jax.jvp(attend, (x,), (x,))[1],
    "cotangent": jax.grad(lambda x: attend(x).astype(jnp.float32).sum()),
}


def end(x):
    field = jaxflow.SelfAttention(beta=9.0)
    return jaxflow.flow(field, jaxflow.Measure(x), t1=5.0, throw=False).final.points


@pytest.mark.parametrize("chips", CHIPS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, d", [("float32", 3), ("bfloat16", 64)])
def test_kernels(chips, mode, dtype, d):
    x = jax.ShapeDtypeStruct((1, 1000, d), jnp.dtype(dtype))
    assert "tpu_custom_call" in compiled(MODES[mode], x, chips=chips)


@pytest.mark.parametrize("chips", CHIPS)
def test_a_flow(chips):
    x = jax.ShapeDtypeStruct((1000, 3), jnp.float32)
    assert "tpu_custom_call" in compiled(end, x, chips=chips)


def test_the_gradient_of_a_flow():
    x = jax.ShapeDtypeStruct((1000, 3), jnp.float32)
    assert "tpu_custom_call" in compiled(jax.grad(lambda x: end(x).sum()), x, chips="v5e")


def test_the_gradient_of_a_language_model():
    lm = LanguageModel(64, 128, 2, 2, 64, dtype=jnp.bfloat16, key=jax.random.key(0))
    params, static = eqx.partition(lm, eqx.is_inexact_array)

    def loss(params, tokens):
        return -jax.nn.log_softmax(eqx.combine(params, static)(tokens))[..., 0].mean()

    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    assert "tpu_custom_call" in compiled(jax.grad(loss), described, tokens, chips="v5e")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, d", [("float32", 3), ("bfloat16", 64)])
def test_a_batch_over_four_chips_is_not_gathered(mode, dtype, d):
    text = compiled(
        MODES[mode], jax.ShapeDtypeStruct((8, 256, d), jnp.dtype(dtype)), chips="v5e", over=4
    )
    assert "tpu_custom_call" in text
    assert not re.search(r"all-(gather|to-all|reduce)[-\w]*\(", text)


def test_a_flow_of_a_batch_over_four_chips_is_not_gathered():
    x = jax.ShapeDtypeStruct((8, 256, 3), jnp.float32)
    text = compiled(lambda x: end(x), x, chips="v5e", over=4)
    assert "tpu_custom_call" in text and not re.search(r"all-gather[-\w]*\(", text)
