"""Run by test_devices.py in a process with eight devices: prints what it found as JSON."""

import json
import re
import tempfile
import warnings
from functools import partial
from typing import cast
from unittest import mock

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_devices import REFUSED

import jaxflow as jf
from benchmarks.communication import ring_bytes
from jaxflow import training
from jaxflow.kernels import primitives
from jaxflow.training.devices import placement
from jaxflow.training.step import State, Step, update

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute"


def place(x, *axes, mesh=MESH):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def square(fn):
    return lambda *args: (fn(*args) ** 2).sum()


def found(fn, args, placed, whole=None) -> dict:
    """Collectives in the compiled text, the first result's sharding, the largest difference from
    the function (or from another one) on one device, of the largest number of each result or 1."""
    compiled = jax.jit(fn).lower(*placed).compile()
    text = compiled.as_text() or ""
    outs, expected = (jax.tree.leaves(x) for x in (compiled(*placed), (whole or fn)(*args)))
    pairs = zip(outs, expected, strict=True)
    return {
        "collectives": {c: n for c in COLLECTIVES if (n := len(re.findall(rf"{c}[-\w]*\(", text)))},
        "spec": [None if a is None else list((a,) if isinstance(a, str) else a)
                 for a in outs[0].sharding.spec],
        "error": max(
            float(abs(np.asarray(a) - np.asarray(b)).max() / max(1, abs(np.asarray(b)).max()))
            for a, b in pairs
        ),
    }  # fmt: skip


def modes(fn, args, placed) -> dict:
    """The function, its tangent and its gradient."""
    every = tuple(range(len(args)))
    tangent = lambda *args: jax.jvp(fn, args, args)[1]
    fns = {"forward": fn, "tangent": tangent, "cotangent": jax.grad(square(fn), every)}
    return {mode: found(f, args, placed) for mode, f in fns.items()}


def heads(options, x):
    """A batch of heads, in two axes."""
    attend = lambda x: jf.softmax_expectation(x, x, x, scale=0.5, **options)[0]
    return jax.vmap(jax.vmap(attend))(x)


def cases() -> dict:
    x = normal(0, 4, 2, 24, 3)
    placed = (place(x, "a", "b"),)
    results = {
        "plain": modes(lambda x: heads({}, x), (x,), placed),
        "causal": {"forward": found(lambda x: heads({"causal": True}, x), (x,), placed)},
    }
    q, k = normal(1, 24, 3), normal(2, 20, 3)
    attend = lambda q, k: jf.softmax_expectation(q, k, k, scale=0.5)[0]
    results["queries"] = modes(attend, (q, k), (place(q, "a"), place(k)))

    # As on a TPU, for which JAX takes no rules.
    with mock.patch.object(primitives, "WITHOUT_RULES", ("cpu",)):
        jax.clear_caches()
        results["by size"] = modes(lambda x: heads({}, x), (x,), (place(x, "a", "b"),))
        results["queries by size"] = modes(attend, (q, k), (place(q, ("a", "b")), place(k)))
    jax.clear_caches()

    points = jf.Sphere().retract(normal(3, 8, 12, 3))
    flow = lambda x: jf.flow(jf.SelfAttention(beta=2.0), jf.Measure(x), t1=1.0).last.points
    placed = (place(points, ("a", "b")),)
    results["flow"] = {
        "forward": found(flow, (points,), placed),
        "cotangent": found(jax.grad(square(flow)), (points,), placed),
    }
    explicit = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    out = flow(place(points, "a", mesh=explicit))
    around = lambda backend: (
        lambda x: jf.softmax_expectation(x, x, x, causal=True, backend=backend)[0]
    )
    tokens = normal(9, 16, 3)
    both = zip(
        jax.jit(jax.value_and_grad(square(around("ring"))))(place(tokens, "a", mesh=explicit)),
        jax.value_and_grad(square(around(None)))(tokens),
        strict=True,
    )
    results["explicit ring"] = max(
        float(abs(np.asarray(a) - np.asarray(b)).max() / abs(b).max()) for a, b in both
    )
    results["explicit"] = {
        "spec": list(cast(NamedSharding, out.sharding).spec),
        "devices": len(out.sharding.device_set),
    }

    divided = jax.shard_map(lambda x: heads({}, x), mesh=MESH, in_specs=PartitionSpec("a"),
                            out_specs=PartitionSpec("a"), check_vma=True)  # fmt: skip
    partly = jax.shard_map(lambda x: heads({}, x), mesh=MESH, in_specs=PartitionSpec("a"),
                           out_specs=PartitionSpec("a"), axis_names={"a"})  # fmt: skip
    results["partly manual"] = {
        "cotangent": found(jax.grad(square(partly)), (x,), (place(x, "a"),))
    }
    results["manual"] = {"cotangent": found(jax.grad(square(divided)), (x,), (place(x, "a"),))}
    return results | rings() | trainings()


def rings() -> dict:
    """Tokens divided: the ring against one device, in float64; and what it sends, in float32."""
    results = {}
    with jax.enable_x64(True):
        wide = lambda seed, *shape: normal(seed, *shape).astype(jnp.float64)
        q, k, v, b = wide(4, 2, 24, 3), wide(5, 2, 21, 3), wide(6, 2, 21, 2), wide(7, 2, 21)
        every = lambda fn: (
            lambda *args: (
                fn(*args),
                jax.jvp(fn, args, args)[1],
                jax.grad(lambda *a: sum((o**2).sum() for o in fn(*a)), tuple(range(len(args))))(
                    *args
                ),
            )
        )
        options = {"weighted": ((q, k, v, b), {}), "causal": ((k, k, v), {"causal": True})}
        for name, (args, more) in options.items():
            attend = lambda backend, more=more: every(
                jax.vmap(partial(jf.softmax_expectation, scale=0.7, backend=backend, **more))
            )
            got = jax.jit(attend("ring:a"))(*(place(x, "b") for x in args))
            want = jax.jit(attend("reference"))(*args)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
            results[f"ring {name}"] = max(float(abs(np.asarray(a) - b).max()) for a, b in pairs)
        points = jf.Sphere().retract(wide(8, 16, 3))
        flow = lambda backend: (
            lambda x: (
                jf.flow(
                    jf.SelfAttention(beta=2.0, causal=True, backend=backend),
                    jf.Measure(x),
                    t1=1.0,
                    dt0=0.5,
                    solver=diffrax.Euler(),
                ).last.points
            )
        )
        for mode, of in {"forward": flow, "cotangent": lambda b: jax.grad(square(flow(b)))}.items():
            results[f"ring flow {mode}"] = found(
                of("ring:a"), (points,), (place(points, "a"),), whole=of(None)
            )
    results["ring bytes"] = [
        ring_bytes(devices, tokens, causal=causal, gradient=gradient)
        for devices, tokens, causal, gradient in [
            (2, 64, False, False),
            (4, 64, False, False),
            (4, 64, True, True),
            (8, 64, True, False),
            (8, 256, False, False),
        ]
    ]
    return results


def trainings() -> dict:
    """Losses of the same steps on some numbers of devices, and what a step sends."""
    digits = training.image_data(batch_size=8)
    model = jf.models.ResidualNetwork(64, 10, 8, 2, width=8, key=jax.random.key(0))
    fit = partial(
        training.fit, model, digits, log_every=1, evaluation_batches=1, accumulate=2,
        optimiser=optax.adam(1e-3),  # whose rate does not know the last step
        progress=False,
    )  # fmt: skip
    losses = lambda fitted: [row["loss"] for row in fitted.history]
    results: dict = {"losses": [losses(fit(steps=4, devices=n)) for n in (1, 4, 8)]}
    with tempfile.TemporaryDirectory() as folder:
        fit(steps=2, devices=training.FullySharded(8), run=folder)
        results["losses"].append(losses(fit(steps=4, devices=2, run=folder, resume=True)))
    results["refused"] = []
    for devices, _ in REFUSED:
        try:
            fit(steps=1, devices=devices)
        except (TypeError, ValueError) as error:
            results["refused"].append(f"{type(error).__name__}: {error}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        placement(None)
    results["warning"] = str(caught[-1].message)
    results["step"] = step_on_four_devices(model, digits)
    return results


def step_on_four_devices(model, digits) -> dict:
    """What it sends where all have the parameters, and how many of the numbers of parameters and
    Adam's moments are on a device where they are divided."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = optax.adam(1e-3)
    state = State(params, optimiser.init(params), jax.random.key(0))
    whole = placement(4)
    batch = tuple(whole.batch(np.stack([a]), axis=1) for a in digits.batch(0))
    step = Step(static, optimiser, training.FlowLoss(training.cross_entropy), whole)
    given = step, batch, np.int32(0), whole.state(jnp.array(True))
    text = update.lower(given, whole.state(state)).compile().compiled.as_text()
    divided = placement(training.FullySharded(4)).state(state)
    local = lambda a: a.addressable_data(0).size
    numbers = [a for a in jax.tree.leaves(divided) if eqx.is_inexact_array(a)]
    return {
        "collectives": [kind for kind in COLLECTIVES if f" {kind}" in text],
        "divided": sum(local(a) for a in numbers if not a.is_fully_replicated),
        "to divide": sum(a.size for a in numbers if not a.is_fully_replicated),
        "not divided": sum(a.size for a in numbers if a.is_fully_replicated),
    }


if __name__ == "__main__":
    print(json.dumps(cases()))
