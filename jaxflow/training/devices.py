"""Where a training runs: how its batches and its state lie on devices.

The step is one program for all devices (`jax.jit` of arrays with a `NamedSharding`): XLA divides
it as its arrays are divided. A batch is divided into equal shares, so that with g_d the mean
gradient of the share of device d of N,

    g = (1 / N) sum_d g_d                                       one sum over devices a step

is the gradient on one device, to rounding. Parameters are the same on every device; with
`FullySharded` a device keeps an N-th of each array of parameters and of the optimiser's state
(ZeRO, Rajbhandari et al., arXiv 1910.02054), which are gathered where they are used.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .._rules import count
from .leaves import put
from .processes import gathered

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class FullySharded:
    """Devices that each keep a part of the parameters and of the optimiser's state, beside their
    share of the batch.

        fit(model, data, steps=1000, devices=jaxflow.training.FullySharded(8))

    An array is divided along its longest axis that the number of devices divides; one without such
    an axis is whole on each.

    **Arguments:**

    - `devices`: how many, or which ones; `None` is all.
    """

    devices: int | Sequence[Any] | None = None


# A number, a list of `jax.Device`, or a policy.
Devices = int | Sequence[Any] | FullySharded | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """How batches and state are placed: by a mesh with one axis, or on JAX's default device."""

    mesh: Mesh | None = None
    sharded: bool = False

    def batch(self, array: Any, axis: int = 0) -> Array:
        """An array of a batch, its samples along an axis: divided, where that is possible."""
        if self.mesh is None:
            return jnp.asarray(array)
        array = np.asarray(array)
        divided = array.shape[axis] % self.mesh.size == 0
        names = (*[None] * axis, AXIS) if divided else ()
        return put(array, NamedSharding(self.mesh, PartitionSpec(*names)))

    def state(self, tree: Any) -> Any:
        """The arrays of a state, which are the same in each process."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda a: put(a, self._sharding(a)), tree)

    def constants(self, tree: Any) -> Any:
        """The arrays among the leaves of a tree, as those of a state; the rest as it is."""
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(self.state(arrays), rest)

    def kept(self, tree: Any) -> Any:
        """A new state, inside a program: it lies where `state` has put the one before."""
        if self.mesh is None:
            return tree
        place = lambda a: jax.lax.with_sharding_constraint(a, self._sharding(a))
        return jax.tree.map(place, tree)

    def returned(self, tree: Any) -> Any:
        """Arrays as a caller takes them: on one device, unless those of one process divide them."""
        if self.mesh is None or jax.process_count() > 1:
            return gathered(tree)
        one = lambda a: a.addressable_data(0) if a.is_fully_replicated else a
        return jax.tree.map(one, tree)

    def check_batch(self, size: int):
        """**Raises:** ValueError for a batch that the devices cannot share equally."""
        if self.mesh is not None and size % self.mesh.size:
            fitting = [n for n in range(1, self.mesh.size) if size % n == 0]
            raise ValueError(
                f"the number of devices must divide the batch, as each takes an equal share; got "
                f"{self.mesh.size} devices and a batch of {size}. Take a batch that is a multiple "
                f"of {self.mesh.size}, or devices={fitting[-1]}."
            )

    def _sharding(self, a: Any) -> NamedSharding:
        assert self.mesh is not None
        fitting = [length if length % self.mesh.size == 0 else 0 for length in a.shape]
        if not (self.sharded and any(fitting)):
            return NamedSharding(self.mesh, PartitionSpec())
        longest = int(np.argmax(fitting))
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, AXIS))


def placement(devices: Devices) -> Placement:
    """What `fit(devices=...)` means. Without devices it is JAX's default one, and a warning names
    those that are idle.

    **Raises:** TypeError for what is no number and no list of devices, ValueError for more devices
    than there are, for one twice, and where some processes would have none.
    """
    if isinstance(devices, FullySharded):
        every = jax.device_count() if devices.devices is None else devices.devices
        return Placement(_mesh(every), sharded=True)
    if devices is not None:
        return Placement(_mesh(devices))
    if jax.process_count() > 1:
        raise ValueError(
            f"a training of {jax.process_count()} processes takes the devices of all of them: pass "
            f"devices={jax.device_count()}."
        )
    if idle := jax.devices()[1:]:
        names = ", ".join(map(str, idle[:8])) + (", ..." if len(idle) > 8 else "")
        warnings.warn(
            f"training runs on {jax.devices()[0]} alone, and these are idle: {names}. Pass "
            f"devices={jax.device_count()} (--devices) to use all, or devices=1 for this one.",
            stacklevel=3,
        )
    return Placement()


def _mesh(devices: int | Sequence[Any]) -> Mesh:
    known = jax.devices()
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        chosen = list(devices)
        if wrong := [d for d in chosen if not isinstance(d, jax.Device)]:
            raise TypeError(
                f"devices must be JAX devices, as jax.devices() lists; got {wrong[0]!r}."
            )
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"devices must be at least one, and none twice; got {chosen}.")
    elif isinstance(devices, str):
        raise TypeError(
            f"devices must be a number of devices or a list of them, got {devices!r}. "
            f"jax.devices() lists them: {', '.join(map(str, known[:8]))}."
        )
    else:
        number = count("devices", devices)
        if number > len(known):
            raise ValueError(
                f"devices={number} were asked for, and JAX has {len(known)} ({known[0].platform}): "
                f"pass at most devices={len(known)}."
            )
        chosen = known[:number]
    idle = {d.process_index for d in known} - {d.process_index for d in chosen}
    if idle:
        raise ValueError(
            f"each process takes part with its devices, and process {min(idle)} would have none: "
            f"pass devices={len(known)}."
        )
    return Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))
