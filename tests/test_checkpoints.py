"""Checkpoints: bit-identical, atomic, and never wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

from jaxflow.training import checkpoints  # noqa: E402
from jaxflow.training.checkpoints import (  # noqa: E402
    best,
    latest,
    metadata,
    remove,
    restore,
    save,
)


class Block(eqx.Module):
    query: jax.Array
    scale: jax.Array
    name: str


def state(seed=0):
    """Every kind of leaf that a training state has."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((3, 4)).astype(np.float32)
    return {
        "blocks": [Block(jnp.asarray(normal), jnp.asarray(rng.random(5), jnp.bfloat16), "a/b.c")],
        "half": jnp.asarray(rng.random(2), jnp.float16),
        "count": jnp.asarray(rng.integers(99), jnp.int32),
        "mask": jnp.asarray(rng.random(3) > 0.5),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "numpy": rng.standard_normal(4),
        "number": np.float32(rng.random()),
        "tanh": jnp.tanh,
        "rate": 0.1,
    }


def bits(tree):
    """The dtype, shape and bytes of each array."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(x) if k else x for x, k in zip(leaves, keys, strict=True)]
    names = [str(leaf.dtype) for leaf in leaves]
    hosts = [np.asarray(x) for x in data]
    return [(n, x.shape, x.tobytes()) for n, x in zip(names, hosts, strict=True)]


def put(folder, tree, step=1000, **options):
    return save(folder, tree, step=step, config={"d": 3}, cursor={"step": step}, **options)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    path = put(tmp_path, state(), metrics={"loss": 0.1})
    assert path == tmp_path / "step-00001000" == latest(tmp_path)
    found, meta = restore(path, state(seed=1))
    assert bits(found) == bits(state())
    assert found["tanh"] is jnp.tanh and found["blocks"][0].name == "a/b.c"
    assert isinstance(found["numpy"], np.ndarray) and type(found["number"]) is np.float32
    assert (meta["step"], meta["config"], meta["cursor"]) == (1000, {"d": 3}, {"step": 1000})
    assert meta["metrics"] == {"loss": 0.1} and meta == metadata(path)


def test_a_state_comes_back_into_shapes_alone(tmp_path):
    tree = eqx.filter(state(), lambda leaf: isinstance(leaf, jax.Array))
    found, _ = restore(put(tmp_path, tree), jax.eval_shape(lambda: tree))
    assert bits(found) == bits(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_float64_comes_back(tmp_path, x64):
    tree = {"x": jnp.linspace(0, 1, 7, dtype=jnp.float64)}
    found, _ = restore(put(tmp_path, tree), tree)
    assert bits(found) == bits(tree)


def test_arrays_go_where_those_of_the_tree_are(tmp_path):
    device = jax.devices()[0]
    tree = {"here": jax.device_put(jnp.ones(3), device), "anywhere": jnp.ones(3)}
    found, _ = restore(put(tmp_path, tree), tree)
    assert found["here"].committed and found["here"].devices() == {device}
    assert not found["anywhere"].committed


@pytest.mark.parametrize("tree", [{}, {"rate": 0.1}, {"empty": jnp.zeros((0, 3))}])
def test_a_state_without_numbers(tmp_path, tree):
    found, meta = restore(put(tmp_path, tree), tree)
    assert bits(found) == bits(tree) and meta["step"] == 1000


# ------------------------------------------------------------------ what does not fit


def test_another_tree_is_refused_by_name(tmp_path):
    path = put(tmp_path, {"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"has besides \['b'\] \(1 of 2 arrays\)"):
        restore(path, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"has no \['c'\]"):
        restore(path, {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"array \['b'\] is .*\[2\].*, the tree has .*\[3\]"):
        restore(path, {"a": jnp.ones(3), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"array \['a'\] is .*float32.*, the tree has .*float16"):
        restore(path, {"a": jnp.ones(3, jnp.float16), "b": jnp.ones(2)})


def test_a_key_of_another_generator_is_refused(tmp_path):
    # The data of both are four uint32.
    path = put(tmp_path, {"key": jax.random.key(0, impl="rbg")})
    with pytest.raises(ValueError, match=r"\['key'\] is .*'rbg'.*, the tree has .*'unsafe_rbg'"):
        restore(path, {"key": jax.random.key(0, impl="unsafe_rbg")})
    with pytest.raises(ValueError, match=r"\['key'\] is .*'rbg'"):
        restore(path, {"key": jax.random.key_data(jax.random.key(0, impl="rbg"))})


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint.*latest"):
        restore(tmp_path, {})
    assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
    assert best(tmp_path) is None


def test_a_config_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="must be JSON: .*complex"):
        save(tmp_path / "run", {}, step=1, config={"z": 1j}, cursor={})
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        put(tmp_path, {}, step=1, keep=0)


def test_numbers_as_keys_of_a_config_become_strings(tmp_path):
    path = save(tmp_path, {}, step=1, config={"a": {1: float("inf")}}, cursor={})
    assert metadata(path)["config"] == {"a": {"1": float("inf")}}


# ------------------------------------------------------------------ damage


def flips(content: bytes, count: int):
    for i in range(0, len(content), max(1, len(content) // count)):
        yield content[:i] + bytes([content[i] ^ 0x41]) + content[i + 1 :]


def attempt(path, expected) -> bool:
    """Whether a damaged checkpoint restores; what it restores is right."""
    try:
        found, meta = restore(path, expected)
    except ValueError as error:
        assert "is damaged" in str(error) or "is no checkpoint" in str(error)
        return False
    assert bits(found) == bits(expected)
    assert (meta["step"], meta["config"], meta["cursor"]) == (1000, {"d": 3}, {"step": 1000})
    return True


@pytest.fixture
def stored(tmp_path):
    tree = {"small": jnp.arange(3), "big": jax.random.normal(jax.random.key(0), (64, 64))}
    return put(tmp_path, tree), tree


@pytest.mark.slow
def test_a_flipped_byte_never_gives_a_wrong_value(stored):
    path, tree = stored
    refused = set()
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        for damaged in flips(content, 10):
            file.write_bytes(damaged)
            if not attempt(path, tree):
                refused.add(file)
        file.write_bytes(content)
    largest = max(path.rglob("arrays/**/*"), key=lambda file: file.stat().st_size)
    assert {largest, path / "manifest.json"} <= refused
    assert attempt(path, tree)


def test_a_truncated_or_missing_file_never_gives_a_wrong_value(stored):
    path, tree = stored
    refused = set()
    for file in [file for file in path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        truncated = attempt(path, tree)
        file.unlink()
        if not truncated and not attempt(path, tree):
            refused.add(file)
        file.write_bytes(content)
    largest = max(path.rglob("arrays/**/*"), key=lambda file: file.stat().st_size)
    assert {largest, path / "manifest.json"} <= refused
    shutil.rmtree(path / "arrays")
    assert not attempt(path, tree)


def test_the_damaged_array_is_named_and_the_remedy_given(stored):
    path, tree = stored
    put(path.parent, tree, step=900)
    largest = max(path.rglob("arrays/**/*"), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    middle = len(content) // 2
    largest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError) as raised:
        restore(path, tree)
    message = str(raised.value)
    assert f"checkpoint {path} is damaged: array ['big'] has sha256" in message
    assert f"delete it and resume from {path.parent / 'step-00000900'}." in message


def test_a_changed_manifest_is_refused(stored):
    path, tree = stored
    file = path / "manifest.json"
    sealed = json.loads(file.read_text())
    sealed["manifest"]["cursor"]["step"] = 1001
    file.write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="manifest.json does not .* no other one is beside it"):
        restore(path, tree)


def test_damaged_is_not_absent(stored):
    """A damaged checkpoint is an error for who asks for it, and is never removed."""
    path, tree = stored
    newer = put(path.parent, tree, step=2000, metrics={"loss": 0.1})
    assert latest(path.parent) == newer == best(path.parent)
    manifest = newer / "manifest.json"
    content = manifest.read_bytes()
    for damaged in (b"", b"{", content[:-20], content.replace(b"2000", b"3000"), b"[]", None):
        manifest.unlink() if damaged is None else manifest.write_bytes(damaged)
        for ask in (latest, best):
            with pytest.raises(ValueError, match=f"{newer} is damaged: .*manifest.json") as raised:
                ask(path.parent)
            assert f"delete it and resume from {path}." in str(raised.value)
        with pytest.raises(ValueError, match="is damaged"):
            remove(newer)
    put(path.parent, tree, step=3000, metrics={"loss": 0.2}, keep=1)
    assert steps(path.parent) == [2000, 3000]
    shutil.rmtree(newer)
    assert best(path.parent) == path.parent / "step-00003000"


# ------------------------------------------------------------------ which ones stay


def steps(run):
    return sorted(int(path.name[5:]) for path in run.iterdir())


def test_the_last_ones_and_the_best_stay(tmp_path):
    for step, loss in {1: 0.5, 2: 0.1, 3: 0.3, 4: float("nan"), 5: 0.2}.items():
        put(tmp_path, {"a": jnp.full(2, step)}, step=step, metrics={"loss": loss})
    assert steps(tmp_path) == [2, 4, 5]
    assert best(tmp_path) == tmp_path / "step-00000002"
    put(tmp_path, {}, step=100_000_000, metrics={"accuracy": 0.9}, keep=1)
    assert steps(tmp_path) == [2, 100_000_000]


def test_a_step_saved_again_is_replaced(tmp_path):
    put(tmp_path, {"a": jnp.zeros(2)}, metrics={"loss": 0.1})
    path = put(tmp_path, {"a": jnp.ones(2)}, metrics={"loss": 0.2})
    found, _ = restore(path, {"a": jnp.zeros(2)})
    assert bits(found) == bits({"a": jnp.ones(2)}) and steps(tmp_path) == [1000]


def test_a_run_killed_while_it_replaces_a_step(tmp_path):
    """Between the two renames the old one is found; after them it is not, and goes."""
    old = put(tmp_path, {"a": jnp.zeros(2)})
    replaced = tmp_path / "step-00001000.replaced"
    old.rename(replaced)
    assert latest(tmp_path) == replaced
    put(tmp_path, {"a": jnp.ones(2)}, step=1000)
    assert latest(tmp_path) == old and not replaced.exists()
    shutil.copytree(old, replaced)
    assert latest(tmp_path) == old
    put(tmp_path, {"a": jnp.ones(2)}, step=1000)
    assert not replaced.exists()


WRITER = """
import sys, jax.numpy as jnp
from jaxflow.training.checkpoints import save
state = lambda k: {"w": jnp.full((256, 256), k, jnp.float32), "k": jnp.asarray(k, jnp.int32)}
for k in range(1, 1_000_000):
    save(sys.argv[1], state(k), step=k // 3, config={}, cursor={"k": k})
    print(k, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    like = {"w": jnp.zeros((256, 256)), "k": jnp.zeros((), jnp.int32)}
    for kill in range(3):
        run = tmp_path / str(kill)
        last = write_until_killed(run, seconds=np.random.default_rng(kill).uniform(0, 0.3))
        path = latest(run)
        assert path is not None
        found, meta = restore(path, like)
        k = meta["cursor"]["k"]
        # The last that was announced, or one that was killed between its rename and its print.
        assert k in (last, last + 1)
        assert bits(found) == bits(
            {"w": jnp.full((256, 256), k, jnp.float32), "k": jnp.asarray(k, jnp.int32)}
        )
        put(run, like, step=10**6)
        assert all(path.name.startswith("step-") for path in run.iterdir())


def write_until_killed(run: Path, seconds: float) -> int:
    """Kills a process some seconds after its third checkpoint; the number of its last one."""
    command = [sys.executable, "-c", WRITER, str(run)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as writer:
        assert writer.stdout is not None
        announced = [writer.stdout.readline() for _ in range(3)]
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        announced += writer.stdout
    return int(announced[-1])


def test_arrays_that_cannot_be_written_leave_the_checkpoint_before(stored, monkeypatch):
    path, tree = stored

    class Full:
        __init__ = lambda self, **options: None
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None

        def save(self, *args):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints.require(), "StandardCheckpointer", Full)
    with pytest.raises(OSError, match="step-00002000 could not be written: .*No space left"):
        put(path.parent, tree, step=2000)
    assert steps(path.parent) == [1000] and attempt(path, tree)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.delitem(sys.modules, "orbax.checkpoint", raising=False)
    with pytest.raises(ImportError, match=r'orbax-checkpoint: pip install "jaxflow\[train\]"'):
        put(tmp_path, {"a": jnp.ones(2)})
    assert latest(tmp_path) is None
