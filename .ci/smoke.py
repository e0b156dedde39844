"""What an installed wheel must do with its dependencies alone: a flow, a gradient, the commands."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxflow as jf


def run(*command: str) -> str:
    done = subprocess.run(["jaxflow", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def product(beta: float):
    """rho(1) of two tokens at right angles, which grows with the time and with exp(beta rho)."""
    x = jf.flow(jf.SelfAttention(beta=beta), jf.Measure(jnp.eye(2)), t1=1.0).last.points
    return x[0] @ x[1]


assert Path(jf.__file__).is_relative_to(Path.cwd()), f"{jf.__file__} is not the wheel's"
print({name: metadata.version(name) for name in ("jax", "numpy", "scipy", "diffrax", "typer")})
value, slope = jax.value_and_grad(product)(0.0)
# beta = 0: theta' = -sin(theta), so that tan(theta / 2) = e^{-t} from theta = pi / 2.
assert abs(value - jnp.tanh(1.0)) < 1e-4, value
assert abs(slope - (product(1e-2) - product(-1e-2)) / 2e-2) < 1e-2, slope
for name in jf.__all__:
    getattr(jf, name)
assert run("--version").split() == ["jaxflow", metadata.version("jaxflow")]
told = run("simulate", "--n", "16", "--t1", "1", "--frames", "3", "--out", "run")
assert 'pip install "jaxflow[viz]"' in told, told
rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
assert [row["t"] for row in rows] == [0.0, 0.5, 1.0]
