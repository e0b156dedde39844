"""Trainings of several processes, each with devices of its own.

All run the same program on the same arguments, and JAX divides its arrays among the devices of all
of them. The first process alone reads and writes the run folder. What a process decides by itself
(a signal came, the time is over) is agreed on before any acts on it, as the others would wait for
it in the next sum.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils

from .._rules import count
from .leaves import blank, from_host, to_host

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOST = 60  # seconds without a sign of a process, after which the others end
_HEADER = 2**14  # bytes

Tree = TypeVar("Tree")


def join() -> int:
    """Joins this process with the others of its job, by `jax.distributed.initialize`.

    Call it before anything else of JAX. Which processes there are is said by the environment:

    - `srun` of SLURM says all by itself, in a step of several tasks.
    - Elsewhere JAX_COORDINATOR_ADDRESS is host:port of the first process, which the others can
      reach, JAX_NUM_PROCESSES how many there are, and JAX_PROCESS_ID which one this is, from 0 on.

    A process that has joined already, as by a call of `jax.distributed.initialize` of your own,
    stays as it is. Where a process ends without a word, the others end within 60 seconds, and the
    run goes on from its last checkpoint with those that are left: start them anew, with
    `resume=True`.

    **Returns:** the number of processes; 1 where the environment names no others.

    **Raises:** ValueError where the environment says a part alone, or what cannot be.

    ```python
    >>> processes = jaxflow.training.join()  # doctest: +SKIP

    ```
    """
    if jax.distributed.is_initialized():
        return jax.process_count()
    start = partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=LOST, shutdown_timeout_seconds=LOST
    )
    if ADDRESS in os.environ:
        start(*_explicit())
    elif _tasks_of_slurm() > 1:
        start(cluster_detection_method="slurm")
    return jax.process_count()


def _tasks_of_slurm() -> int:
    name, job = "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"
    tasks = os.environ.get(name, "1")
    if not tasks.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {tasks!r}: start it by srun.")
    if int(tasks) > 1 and job not in os.environ:
        raise ValueError(f"{name} is {tasks}, so {job} must name the job: start it by srun.")
    return int(tasks)


def _explicit() -> tuple[str, int, int]:
    missing = [name for name in (PROCESSES, PROCESS) if not os.environ.get(name, "").isdecimal()]
    if missing:
        raise ValueError(
            f"{ADDRESS} asks for several processes, so {missing[0]} must be a whole number, got "
            f"{os.environ.get(missing[0])!r}: set {PROCESSES} to how many there are and {PROCESS} "
            "to which one this is, from 0 on."
        )
    address, processes, process = (os.environ[name] for name in (ADDRESS, PROCESSES, PROCESS))
    if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
        raise ValueError(f"{ADDRESS} must be host:port of the first process, got {address!r}.")
    total, own = count(PROCESSES, int(processes)), int(process)
    if own >= total:
        raise ValueError(f"{PROCESS} must be less than {PROCESSES}, got {own} and {total}.")
    return address, total, own


def is_first() -> bool:
    """Whether this process reads and writes for all.

    **Returns:** True in process 0, which is the only one where there are not several.

    ```python
    >>> jaxflow.training.is_first()
    True

    ```
    """
    return jax.process_index() == 0


def agreed(*numbers: int) -> list[int]:
    """The largest of each number in all processes, which all of them call."""
    if jax.process_count() == 1:
        return list(numbers)
    found = multihost_utils.process_allgather(np.array(numbers, np.int32))
    return [int(n) for n in np.asarray(found).reshape(-1, len(numbers)).max(axis=0)]


def gathered(tree: Tree) -> Tree:
    """The arrays of a tree, whole in each process; all processes call it."""
    if jax.process_count() == 1:
        return tree

    def whole(a):
        if a.is_fully_replicated:
            return a.addressable_data(0)
        return jnp.asarray(multihost_utils.process_allgather(a, tiled=True))

    return jax.tree.map(whole, tree)


def of_first(read: Callable[[], Any], like: Any) -> Any:
    """What the first process reads, in all of them: None, or (state, parameters or None, JSON).

    `read` is called in the first process alone. The arrays lie where those of the state `like` do.

    **Raises:** what `read` raises in the first process, and RuntimeError with its words elsewhere.
    """
    if jax.process_count() == 1:
        return read()
    found, error = None, None
    if is_first():
        try:
            found = read()
        except Exception as raised:
            error = raised
    state, best, about = found or (None, None, None)
    header = {"error": error and str(error)[:2000], "found": found is not None}
    header |= {"best": best is not None, "about": about}
    header = _broadcast_json(header)
    if error is not None:
        raise error
    if header["error"]:
        raise RuntimeError(f"the first process: {header['error']}")
    if not header["found"]:
        return None
    state = _broadcast(state, like)
    best = _broadcast(best, like.params) if header["best"] else None
    return state, best, header["about"]


def _broadcast_json(content: Any) -> Any:
    text = json.dumps(content).encode() if is_first() else b""
    padded = np.frombuffer(text[:_HEADER].ljust(_HEADER), np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return json.loads(found.astype(np.uint8).tobytes())


def _broadcast(tree: Any, like: Any) -> Any:
    """The arrays of the first process, placed as those of `like`."""
    leaves, structure = jtu.tree_flatten(like)
    # Where nothing was read, nothing is asked of other devices: the first process does not either.
    own = map(blank, leaves) if tree is None else map(to_host, jtu.tree_leaves(tree))
    hosts = [np.asarray(multihost_utils.broadcast_one_to_all(a)) for a in own]
    placed = [from_host(host, leaf) for host, leaf in zip(hosts, leaves, strict=True)]
    return jtu.tree_unflatten(structure, placed)
