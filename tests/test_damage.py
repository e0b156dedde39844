"""Whatever happens to a file of a run, it is found by its name, or it changes nothing.

    PYTHONPATH=. python tests/test_damage.py 1000

damages so many copies of a run folder, one bit, one byte, or the end of one file each, and counts
what resuming, loading and restoring make of them.
"""

import collections
import shutil
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

from jaxflow import training  # noqa: E402
from jaxflow._folder import read_settings  # noqa: E402
from jaxflow.training import checkpoints, record  # noqa: E402
from jaxflow.training.record import Place, Record  # noqa: E402


class Model(eqx.Module):
    weight: jax.Array
    bias: jax.Array


class State(eqx.Module):
    params: Model
    count: jax.Array
    key: jax.Array


def state(step: int) -> State:
    rng = np.random.default_rng(step)
    weight = jnp.asarray(rng.standard_normal((16, 16)), jnp.float32)
    params = Model(weight, jnp.asarray(rng.standard_normal(3), jnp.float32))
    return State(params, jnp.asarray(step, jnp.int32), jax.random.key(step))


ABOUT = {
    "config": {"settings": {"learning_rate": 1e-3, "solver": "heun"}, "model": {"dim": 4}},
    "data": {"kind": "points", "size": 8},
    "accumulate": 1,
}


def write(run: Path):
    """A run of three checkpoints, the best of them neither the first nor the last."""
    with record.opened(run, resume=False) as folder:
        kept = Record(folder, 3, ABOUT)
        kept.begin()
        place = Place()
        for loss in (0.5, 0.125, 0.25):
            place = place.after(2.0, 1.0).evaluated(loss)
            kept.log(place.step, {"loss": loss, "validation_loss": loss})
            kept.save(state(place.step), place, loss)


def read(run: Path):
    """All that is read of a run: (name, what it gave or the error)."""

    def resumed():
        with record.opened(run, resume=True) as folder:
            kept = Record(folder, 3, ABOUT)
            return kept.resume(state(0)), kept.history

    readers = {
        "settings": lambda: read_settings(run / "config.json", unchanged=True),
        "best": lambda: training.load(run, state(0).params),
        "latest": lambda: training.load(run, state(0).params, which="latest"),
    }
    for path in sorted((run / "checkpoints").iterdir()):
        readers[path.name] = lambda path=path: checkpoints.restore(path, state(0))
    for name, reader in (readers | {"resumed": resumed}).items():
        try:
            yield name, reader()
        except ValueError as error:
            yield name, error


def contents(run: Path) -> dict[str, bytes]:
    files = sorted(p for p in run.rglob("*") if p.is_file())
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit or one byte is another, or the end is missing."""
    at = int(rng.integers(len(content)))
    kind = rng.integers(3)
    if kind == 0:
        return content[:at]
    flip = 1 << int(rng.integers(8)) if kind == 1 else int(rng.integers(1, 256))
    return content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]


def same(a, b) -> bool:
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    bits = lambda x: np.asarray(data(x)).tobytes() if eqx.is_array(x) else x
    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


def attack(folder: Path, count: int, seed: int = 0) -> collections.Counter:
    """How often a damaged file was refused by name, or read as if nothing had happened."""
    rng = np.random.default_rng(seed)
    write(folder / "whole")
    whole = contents(folder / "whole")
    expected = dict(read(shutil.copytree(folder / "whole", folder / "expected")))
    assert not any(isinstance(value, ValueError) for value in expected.values())
    found = collections.Counter()
    for _ in range(count):
        name = str(rng.choice(sorted(whole)))
        run = shutil.copytree(folder / "whole", folder / "damaged")
        (run / name).write_bytes(damage(whole[name], rng))
        before = contents(run)
        outcomes = set()
        for reader, value in read(run):
            if isinstance(value, ValueError):
                assert str(Path(name).name) in str(value), (name, str(value))
                assert contents(run) == before, (name, reader)
                outcomes.add("refused")
            else:
                assert same(value, expected[reader]), (name, reader)
                outcomes.add("read")
        kind = Path(name).name if "arrays" not in name else "arrays"
        found[kind, "refused by name" if "refused" in outcomes else "harmless"] += 1
        # Nothing was removed, even where it was resumed.
        assert contents(run).keys() >= whole.keys(), name
        shutil.rmtree(run)
    return found


def test_forty_damaged_files_are_found_by_name_or_harmless(tmp_path):
    found = attack(tmp_path, 40)
    assert found["arrays", "refused by name"] > 20
    assert found["arrays", "harmless"] == 0


@pytest.mark.slow
def test_a_hundred_damaged_files_are_found_by_name_or_harmless(tmp_path):
    """As a program, this file damages as many as it is told."""
    found = attack(tmp_path, 100, seed=1)
    assert found["arrays", "harmless"] == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for (file, outcome), times in sorted(attack(Path(scratch), int(sys.argv[1])).items()):
            print(f"{file:16} {outcome:16} {times}")
