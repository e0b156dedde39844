"""Programs that are kept on disk; functions that are one program; what a first flow compiles."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import _cache
from jaxflow._functions import by_code

# A flow that is saved at times and observed, one that is stopped too, and what each compiled.
SCRIPT = """
import collections, diffrax, jax, jax.numpy as jnp, numpy as np, jaxflow as jf
jf.enable_compilation_cache()
points = np.eye(4, dtype=np.float32)
field, mu0 = jf.SelfAttention(beta=2.0), jf.Measure(points)
saveat, count = diffrax.SaveAt(ts=np.linspace(0, 50, 5)), collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: count.update([name]))
for event in None, jf.events.until_clustered():
    count.clear()
    sol = jf.flow(
        field, mu0, t1=50.0, saveat=saveat, event=event,
        observe={"mean": lambda t, mu: mu.mean},
    )
    print(count["/jax/compilation_cache/cache_misses"], count["/jax/compilation_cache/cache_hits"])
"""


def compiled(folder: Path) -> list[tuple[int, ...]]:
    """Programs that a process of its own compiles for each flow, and those it finds on disk."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"JAXFLOW_CACHE": str(folder), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return [tuple(int(number) for number in line.split()) for line in out.stdout.splitlines()]


def test_a_second_process_compiles_nothing(tmp_path):
    (misses, hits), (more, _) = compiled(tmp_path)
    assert 1 <= misses <= 3 and hits == 0
    first, second = compiled(tmp_path)
    assert first == (0, misses) and second[0] == 0 and second[1] >= more >= 1


# ------------------------------------------------------------------ where it is


@pytest.fixture
def jax_cache():
    """JAX's own settings, as they were before."""
    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("jax_cache")
def test_the_folder_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXFLOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = jf.enable_compilation_cache(tmp_path / "asked")
    assert place is not None and place.parent == tmp_path / "asked" and place.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(place)  # pyright: ignore[reportAttributeAccessIssue]
    assert jf.enable_compilation_cache() == place  # what JAX has stays
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAXFLOW_CACHE", "")
    assert jf.enable_compilation_cache() is None
    monkeypatch.setenv("JAXFLOW_CACHE", str(tmp_path / "named"))
    assert jf.enable_compilation_cache() == tmp_path / "named" / place.name
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAXFLOW_CACHE")
    assert jf.enable_compilation_cache() == tmp_path / "home" / "jaxflow" / place.name


@pytest.mark.usefixtures("jax_cache")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXFLOW_CACHE", raising=False)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        jf.enable_compilation_cache(tmp_path / "file")
    # Nobody asked for this one, and a run needs no cache.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert jf.enable_compilation_cache() is None


def test_each_kind_of_processor_has_programs_of_its_own(monkeypatch):
    here = _cache._processor()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert _cache._processor() != here


# ------------------------------------------------------------------ functions by their code

LEVEL = 3.0


def made(factor):
    return lambda t, mu: factor * mu.mean + LEVEL


def test_functions_that_do_the_same_are_equal(monkeypatch):
    one, other = by_code(made(2)), by_code(made(2))
    assert (
        one == other and hash(one) == hash(other) and one(0.0, jf.measure.circle(4)).shape == (2,)
    )
    assert one != by_code(made(3)) and one != by_code(made(2.0))
    monkeypatch.setitem(globals(), "LEVEL", 4.0)  # a cell of a notebook, run again
    assert one != by_code(made(2))
    array = jnp.ones(2)
    assert by_code(made(array)) == by_code(made(array)) != by_code(made(jnp.ones(2)))


def test_functions_that_may_change_equal_themselves_alone():
    for closed in (np.ones(2), [1.0], {"a": 1}, object()):
        fn = made(closed)
        assert by_code(fn) is fn
    assert by_code(jnp.sin) is jnp.sin


def test_a_function_that_calls_itself():
    def countdown(t, mu):
        return mu if t == 0 else countdown(t - 1, mu)

    assert by_code(countdown) == by_code(countdown)


TRACED = []


def traced(mu):
    TRACED.append(mu)
    return mu.mean


def test_a_lambda_in_a_loop_is_one_program():
    counts = []
    for _ in range(2):
        jf.flow(
            jf.SelfAttention(beta=2.0),
            jf.measure.simplex(3, 3),
            t1=0.5,
            observe={"mean": lambda t, mu: traced(mu)},
            event=jf.events.until_above(lambda t, mu: traced(mu).sum(), 9.0),
        )
        counts.append(len(TRACED))
    assert 0 < counts[0] == counts[1]
