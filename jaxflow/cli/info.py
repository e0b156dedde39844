"""`jaxflow info`: versions, devices, the backend and kernel chosen for a shape, and why."""

import platform
from collections.abc import Iterator
from importlib import metadata

import jax
import jax.numpy as jnp

from .. import __version__
from ..kernels import check, explain_backend
from ..kernels.base import MODES
from .console import say, table
from .reading import Information


def info(s: Information):
    """Prints what runs here."""
    if s.check_kernels:
        _check()
    rows = [("python", platform.python_version()), ("jaxflow", __version__)]
    for package in ("jax", "jaxlib", "diffrax", "equinox", "optax", "numpy"):
        rows.append((package, metadata.version(package)))
    for extra in ("matplotlib", "ott-jax", "orbax-checkpoint", "tokenizers", "torch"):
        try:
            rows.append((extra, metadata.version(extra)))
        except metadata.PackageNotFoundError:
            rows.append((extra, "not installed"))
    for device in jax.devices():
        rows.append((f"device {device.id}", f"{device.platform}: {device.device_kind}"))
    table("jaxflow", rows)
    table(f"what runs for n = {s.n}, d = {s.d}, {s.dtype}", _choices(s))


def _choices(s: Information) -> Iterator[tuple[str, str, str]]:
    """Each mode with the backends that are tried, up to the one that runs, and why not others."""
    with jax.enable_x64(s.dtype == "float64"):
        x = jax.ShapeDtypeStruct((s.n, s.d), jnp.dtype(str(s.dtype)))
        for mode in MODES:
            for candidate in explain_backend(x, x, x, mode=mode):
                yield mode, candidate.kernel.name, candidate.verdict


def _check():
    """Checks the kernels before JAX takes the device, keeps the verdicts and prints them."""
    report = check.check(say)
    if not report.verdicts:
        say(f"There is nothing to check: on {report.about['platform']} the portable backend runs.")
        return
    rows = [(*kernel, reason or "right") for kernel, reason in report.verdicts.items()]
    table("kernels on this device", [*rows, *((*k, "not checked") for k in report.unchecked)])
    say(check.summary(report))
    path = check.keep(report)
    say("Kept nowhere, as JAXFLOW_CACHE is empty." if path is None else f"Kept in {path}.")
