"""A recording for machines without a GPU that forgets as much as a CUDA graph does.

`Tape()` is a `Capture`: it notes every tensor operation of a step, with the tensors and numbers it was called with, and
a replay carries out the list again. Python is not run again, so a length, an index or a branch that was decided while
recording is baked in, as it is in a graph. What would wait for the device is refused, as CUDA refuses it while
capturing. What a tape cannot show: streams, memory pools, and a storage swapped under a tensor that stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


class Tape:
    """Records steps. `num_replays` counts what was played, `refuse` makes recording fail at that operation."""

    def __init__(self, refuse: str = "") -> None:
        self.num_replays, self.num_records, self._refuse = 0, 0, refuse

    def __call__(self, step: Any) -> Any:
        self.num_records += 1
        with _Notes(self._refuse) as notes:
            recorded = step()
        out = torch.full_like(recorded, torch.nan)  # recording computes nothing that anybody may use

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return out.copy_(_play(notes.entries, recorded))

        return replay


class _Notes(TorchDispatchMode):
    def __init__(self, refuse: str) -> None:
        super().__init__()
        self.entries: list[tuple] = []
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name.startswith("index") else []
        if name in _WAITS or name == self._refuse or masks:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.entries.append((func, args, kwargs, out))
        return out


def _play(entries: list[tuple], result: torch.Tensor) -> torch.Tensor:
    """The operations again: what an earlier one made is taken from this run, everything else is where it was."""
    made: dict[int, torch.Tensor] = {}

    def now(value: Any) -> Any:
        return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

    for func, args, kwargs, recorded in entries:
        out = func(*tree_map(now, args), **tree_map(now, kwargs))
        for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
            if isinstance(old, torch.Tensor):
                made[id(old)] = new
    return made[id(result)]
