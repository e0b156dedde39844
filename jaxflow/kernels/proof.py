"""Which kernels are proved on a device: the verdicts of the check, where they are kept and asked.

A kernel for a GPU or a TPU is compiled and tested without one as far as that goes, but only a run
on the device shows that it is right there. So `backend=None` takes a kernel only where it passed
the check of check.py, each by itself:

    pallas_gpu (particles)    forward, tangent or cotangent    float32, bfloat16 or float16

A record holds the verdicts, and what they were found with. It is in the user's cache folder, made
on this device with this software, or came with the package in `proved/`, made on this kind of
device. It is read once a process, when a program is lowered.

    {"about": {"device": ..., "jaxlib": ...}, "verdicts": [{"kernel": ..., ...}], "sha256": ...}
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .. import __version__
from .._cache import cache_folder
from .._folder import read_json, sealed, write_text
from .base import Mode

COMMAND = "jaxflow info --check"
SWITCH = "JAXFLOW_KERNELS"  # the environment variable: "proved", or "all", which asks no record
PLATFORMS = ("cuda", "tpu")  # whose kernels want a proof
# What many others run every day is a default without a check of ours.
TRODDEN = ("cudnn (its fused attention)",)
PROVED = Path(__file__).parent / "proved"
# What has to agree with a record of the package; its driver, and its release, may be another.
SHARED = ("platform", "device", "runtime", "jax", "jaxlib", "kernels")
DRIVER = Path("/proc/driver/nvidia/version")

About = dict[str, str]


class Kernel(NamedTuple):
    """What passes or fails as a whole: all its shapes, masks and batches."""

    name: str  # as `describe_backend` says it: "pallas_gpu (particles)"
    mode: Mode
    dtype: str

    def __str__(self):
        return f"{self.name}, {self.mode}, {self.dtype}"


Verdicts = Mapping[Kernel, str | None]  # why a kernel failed, or None where it passed


class Doubt(NamedTuple):
    """Why a kernel is no default; `failed`: it was wrong on this device."""

    reason: str
    failed: bool


# ------------------------------------------------------------------ what the registry asks


def doubt(platform: str, kernel: Kernel) -> Doubt | None:
    """What speaks against a kernel on the device that a program is lowered for, or None."""
    if all_allowed():
        return None
    verdicts, damage = _known(platform, *target(platform))
    if kernel in verdicts:
        reason = verdicts[kernel]
        return reason if reason is None else Doubt(f"it failed the check here: {reason}", True)
    if kernel.name in TRODDEN:
        return None
    return Doubt(damage or "it was not checked on this device yet", False)


def all_allowed() -> bool:
    """Whether the environment asks for all kernels, proved or not.

    **Raises:** `ValueError` for another value of the variable.
    """
    value = os.environ.get(SWITCH) or "proved"
    if value not in ("all", "proved"):
        raise ValueError(f"the environment variable {SWITCH} must be all or proved, got {value!r}.")
    return value == "all"


_advised: list[Kernel] = []


def advise(kernel: Kernel, why: Doubt, chosen: str):
    """Warns, once a process, that an unproved kernel would have run."""
    if _advised:
        return
    _advised.append(kernel)
    warnings.warn(
        f"the backend {chosen!r} runs in place of the kernel {kernel}: {why.reason}. "
        f"`{COMMAND}`, a minute or two once a device and version, turns on the kernels that are "
        "right there: a fused kernel keeps the scores of pairs in registers, 'blocked' writes them "
        f"to memory and reads them again. {SWITCH}=all takes all kernels unchecked.",
        stacklevel=2,
    )


def forget():
    """Reads the records again, such as after a check in this process."""
    _known.cache_clear()


# ------------------------------------------------------------------ what is known


@functools.cache
def _known(platform: str, kind: str, at_hand: bool) -> tuple[Verdicts, str | None]:
    """The verdicts on a kind of device, those of the device at hand last; damage of a record."""
    about = described(platform, kind, at_hand=at_hand)
    paths = sorted(PROVED.glob("*.json"))
    if here := at_hand and record_path(about):
        paths += [here] * os.path.lexists(here)
    verdicts: dict[Kernel, str | None] = {}
    damage = None
    for path in paths:
        try:
            found_with, found = read_record(path)
        except ValueError as error:
            damage = str(error)
            continue
        fields = about if path == here else [name for name in SHARED if name in about]
        if all(found_with.get(name) == about[name] for name in fields):
            verdicts |= found
    return verdicts, damage


def target(platform: str) -> tuple[str, bool]:
    """The kind of device that a program is lowered for, and whether it is at hand."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    try:
        here = jax.local_devices(backend=platform)[0].device_kind
    except RuntimeError:
        here = None
    kind = here if named is None else named.device_kind
    return kind or "", kind is not None and kind == here


def described(platform: str, kind: str, *, at_hand: bool) -> About:
    """What verdicts depend on; of a device that is not at hand, without its driver and runtime."""
    about = software() | {"platform": platform, "device": kind}
    if at_hand:
        client = jax.local_devices(backend=platform)[0].client
        about |= {"runtime": " ".join(client.platform_version.split()), "driver": _driver()}
    return about


@functools.cache
def software() -> About:
    """The versions that verdicts depend on; `kernels` is a digest of the kernels' source."""
    jax_s = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"jaxflow": __version__, "kernels": source_digest()} | jax_s


def source_digest() -> str:
    """Of the files that kernels are made of, their tiles included."""
    folder = Path(__file__).parent
    files = [folder / name for name in ("base.py", "cudnn.py", "pallas_tpu.py")]
    digest = hashlib.sha256()
    for path in [*files, *sorted((folder / "pallas_gpu").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", DRIVER.read_text(errors="replace"))
    except OSError:
        return ""
    return found[0] if found else ""


# ------------------------------------------------------------------ records


def record_path(about: About) -> Path | None:
    """Where the user's record is; None where nothing is kept."""
    if (folder := cache_folder()) is None:
        return None
    kind = re.sub(r"[^0-9A-Za-z]+", "-", about["device"]).strip("-")
    return folder / "kernels" / f"{kind}-{sealed(about)[:12]}.json"


def write_record(path: Path, about: About, verdicts: Verdicts):
    """Writes a record whole.

    **Raises:** `OSError` if it cannot be written.
    """
    rows = [{"kernel": k.name, "mode": k.mode, "dtype": k.dtype, "failure": f}
            for k, f in verdicts.items()]  # fmt: skip
    record: dict[str, Any] = {"about": about, "verdicts": rows}
    record["sha256"] = sealed(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> tuple[About, Verdicts]:
    """What a record was made with, and its verdicts.

    **Raises:** `ValueError`, naming the file and the remedy, if it is damaged.
    """
    try:
        record = read_json(path)
        if record.pop("sha256", None) != sealed(record):
            raise ValueError(f"{path} is not as the check wrote it.")
        rows = record["verdicts"]
        verdicts = {Kernel(r["kernel"], r["mode"], r["dtype"]): r["failure"] for r in rows}
        return dict(record["about"]), verdicts
    except (ValueError, KeyError, TypeError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{path} is no record of the check."
        raise ValueError(f"{text} {_remedy(path)}") from None


def has_record(about: About) -> bool:
    """Whether the user has a sound record that was made with what `about` says."""
    path = record_path(about)
    try:
        return path is not None and read_record(path)[0] == about
    except ValueError:
        return False


def software_has_record(platform: str) -> bool:
    """The same, for some device of the platform, of which nothing else is known yet."""
    folder, wanted = cache_folder(), software() | {"platform": platform}
    for path in () if folder is None else (folder / "kernels").glob("*.json"):
        with contextlib.suppress(ValueError):
            if wanted.items() <= read_record(path)[0].items():
                return True
    return False


def _remedy(path: Path) -> str:
    if path.parent == PROVED:
        return "Put it back as it was released."
    return f"`{COMMAND}` writes it anew."
