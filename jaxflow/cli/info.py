"""`jaxflow info`: versions, devices, and the backend chosen for a shape."""

import platform
from importlib import metadata
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from rich.table import Table

from .. import __version__
from ..kernels import select_backend
from .console import console


def info(
    n: Annotated[int, typer.Option(help="Number of tokens.")] = 16384,
    d: Annotated[int, typer.Option(help="Dimension of a token or of a head.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, float64, float16 or bfloat16.")] = "float32",
):
    """Versions, devices, and the backend chosen for a shape."""
    table = Table(show_header=False, title="jaxflow")
    table.add_row("python", platform.python_version())
    table.add_row("jaxflow", __version__)
    for package in ("jax", "jaxlib", "diffrax", "equinox", "optax", "numpy"):
        table.add_row(package, metadata.version(package))
    for extra in ("matplotlib", "plotly", "ott-jax", "orbax-checkpoint", "tokenizers", "torch"):
        try:
            table.add_row(extra, metadata.version(extra))
        except metadata.PackageNotFoundError:
            table.add_row(extra, "not installed")
    for device in jax.devices():
        table.add_row(f"device {device.id}", f"{device.platform}: {device.device_kind}")
    x = jax.ShapeDtypeStruct((n, d), jnp.dtype(dtype))
    table.add_row(f"backend for n = {n}, d = {d}, {dtype}", select_backend(x, x, x))
    console.print(table)
