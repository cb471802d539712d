"""A substitute for CUDA graphs on machines without a GPU.

`Tape()` is a `Capture`: it records each tensor operation of a step with its tensors and numbers, and a replay runs the
list again. Python is not run again, so lengths, indices and branches are fixed at recording time, as in a graph.
Operations that wait for the device are refused, as CUDA refuses them while capturing. A tape does not cover streams,
memory pools, or a storage that is replaced under an existing tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}


class Tape:
    """Records steps. `num_replays` counts the replays; recording fails at the operation `refuse`."""

    def __init__(self, refuse: str = "") -> None:
        self.num_replays, self.num_records, self._refuse = 0, 0, refuse

    def __call__(self, step: Any) -> Any:
        self.num_records += 1
        with _Notes(self._refuse) as notes:
            recorded = step()
        out = torch.full_like(recorded, torch.nan)  # a recording has no valid output

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
    """Run the operations again on the tensors of this replay, else on the recorded ones."""
    made: dict[int, torch.Tensor] = {}

    def now(value: Any) -> Any:
        return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

    for func, args, kwargs, recorded in entries:
        out = func(*tree_map(now, args), **tree_map(now, kwargs))
        for old, new in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
            if isinstance(old, torch.Tensor):
                made[id(old)] = new
    return made[id(result)]
