"""The folder of a pretrained model, which is not trusted."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..._files import regular
from ..._folder import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor(NamedTuple):
    """What a file says of a tensor; `dtype` is None where it is no floating-point one."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None


class Folder:
    """A folder with config.json and safetensors.

    **Raises:** `ValueError` where there is none.
    """

    def __init__(self, path: str | Path):
        if not isinstance(path, str | os.PathLike) or not Path(path).is_dir():
            raise ValueError(
                f"a pretrained model is a folder on this machine, got {path!r}: download it first."
            )
        self.path = Path(path)

    def config(self) -> dict[str, Any]:
        return read_json(self._inside(CONFIG))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names, from the headers of the files."""
        if os.path.lexists(self.path / WEIGHTS):
            return dict(headers(self._inside(WEIGHTS)))
        if os.path.lexists(self.path / INDEX):
            return self._indexed()
        raise ValueError(
            f"{self.path} has neither {WEIGHTS} nor {INDEX}. Other formats, such as pickles of "
            "PyTorch, can run code when they are read: convert them where you trust them, by "
            "model.save_pretrained(folder) of a current transformers library."
        )

    def _indexed(self) -> dict[str, Tensor]:
        entries = read_json(self._inside(INDEX)).get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
            raise ValueError(f"{self.path / INDEX} must have a weight_map, {{tensor: file}}.")
        found: dict[str, Tensor] = {}
        for name in sorted(set(entries.values())):
            found |= dict(headers(self._inside(name)))
        if missing := sorted(name for name, file in entries.items() if name not in found
                             or found[name].file.name != file):  # fmt: skip
            raise ValueError(f"{INDEX} names {missing[0]}, which is not where it says.")
        return {name: found[name] for name in entries}

    def _inside(self, name: str) -> Path:
        """A regular file right in the folder."""
        path = self.path / name
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"{self.path} names the file {name!r}, which must be right in it.")
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(self.path):
            raise ValueError(
                f"{path} is a link to a file outside of the folder, which is not followed: copy "
                "the folder with what its links name, by cp -rL."
            )
        return regular(path, "a file of a pretrained model")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped; ValueError, naming it, for one that is damaged."""
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        message = 'pretrained models need safetensors: pip install "jaxflow[train]".'
        raise ImportError(message) from error
    try:
        with library.safe_open(path, framework="numpy") as file:
            yield file
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from None


def headers(path: Path) -> Iterator[tuple[str, Tensor]]:
    """What a file says of its tensors, by their names."""
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            part = file.get_slice(name)
            found = _DTYPES.get(part.get_dtype())
            dtype = None if found is None else jnp.dtype(found)
            yield name, Tensor(path, name, tuple(part.get_shape()), dtype)
