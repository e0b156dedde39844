"""Compiled programs that are kept on disk, so that the next process does not compile them again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

FOLDER = "JAXFLOW_CACHE"  # the environment variable that names the folder; empty: no cache


def enable_compilation_cache(folder: str | os.PathLike | None = None) -> Path | None:
    """Keeps every compiled program in a folder, where later processes find it.

    A flow takes seconds to compile and often milliseconds to run; with this call at the start of a
    script, the second run of the script compiles nothing. The command line makes it by itself. It
    sets JAX's own persistent cache, for all programs of the process, also those of other libraries.

    **Arguments:**

    - `folder`: where programs are kept. `None` is what the environment variable JAXFLOW_CACHE
      names (nothing is kept where that is empty), or a folder that JAX already has (such as by
      JAX_COMPILATION_CACHE_DIR), or else `jaxflow` in the user's cache folder.

    **Returns:** the folder in use, one for each kind of processor (a program of another one may end
    in an illegal instruction), or `None`.

    **Raises:** `OSError` where a folder that was asked for cannot be made or written to.

    ```python
    >>> jaxflow.enable_compilation_cache()  # doctest: +SKIP

    ```
    """
    named = os.environ.get(FOLDER) if folder is None else os.fspath(folder)
    if named == "":
        return None
    if named is None and (known := jax.config.jax_compilation_cache_dir):  # pyright: ignore[reportAttributeAccessIssue]
        return Path(known)
    root = _user_cache() if named is None else Path(named).expanduser().absolute()
    place = root / f"programs-{_processor()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        if named is not None:
            raise
        return None  # a home that cannot be written to costs speed, not the run
    if not writable:
        if named is not None:
            raise PermissionError(f"the folder of compiled programs, {place}, is not writable.")
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return place


def cache_folder() -> Path | None:
    """The folder of what jaxflow keeps between processes; None where the environment says none."""
    named = os.environ.get(FOLDER)
    if named is None:
        return _user_cache()
    return Path(named).expanduser().absolute() if named else None


def _user_cache() -> Path:
    """Where platformdirs would put it on Linux, and on macOS where most libraries do."""
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(root) if root else Path.home() / ".cache") / "jaxflow"


def _processor() -> str:
    """A name of the kind of processor, with its instructions: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    text = "\n".join([platform.machine(), *(about or lines[:1])])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
