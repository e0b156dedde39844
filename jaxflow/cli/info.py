"""`jaxflow info`: versions, devices, and the backend and kernel chosen for a shape."""

import platform
from importlib import metadata

import jax
import jax.numpy as jnp

from .. import __version__
from ..kernels import describe_backend
from .console import table
from .reading import Information


def info(s: Information):
    """Prints what runs here."""
    rows = [("python", platform.python_version()), ("jaxflow", __version__)]
    for package in ("jax", "jaxlib", "diffrax", "equinox", "optax", "numpy"):
        rows.append((package, metadata.version(package)))
    for extra in ("matplotlib", "plotly", "ott-jax", "orbax-checkpoint", "tokenizers", "torch"):
        try:
            rows.append((extra, metadata.version(extra)))
        except metadata.PackageNotFoundError:
            rows.append((extra, "not installed"))
    for device in jax.devices():
        rows.append((f"device {device.id}", f"{device.platform}: {device.device_kind}"))
    with jax.enable_x64(s.dtype == "float64"):
        x = jax.ShapeDtypeStruct((s.n, s.d), jnp.dtype(str(s.dtype)))
        rows.append((f"backend for n = {s.n}, d = {s.d}, {s.dtype}", describe_backend(x, x, x)))
    table("jaxflow", rows)
