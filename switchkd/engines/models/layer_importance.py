"""Measures what the removal of layers costs a model, and chooses the layers that a pruned student keeps.

In: a teacher and token ids of a few texts. Out: layer indices. The cost of a layer is the mean KL(p‖q) over the tokens
of the texts, p of the whole model and q of the model without this layer, in nats. ShortGPT (arXiv 2403.03853) removes
layers by such a ranking, Gromov et al. (arXiv 2403.17887) one contiguous block.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DepthPruneConfig, ModelConfig
from switchkd.engines.models.demo import cache_dir
from switchkd.engines.models.loading import load_model
from switchkd.engines.models.sources import fingerprint

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

MAX_GAP = 1e-4
"""Nats by which a pass from the middle of a model may differ from a whole one: float32 rounding stays far below."""

Texts = Sequence[Sequence[int]]
"""Token ids of each text."""


def is_measured(prune: DepthPruneConfig) -> bool:
    """Whether the choice of layers needs texts."""
    return prune.layers is None and prune.by != "even"


def cheapest_layers(teacher: ModelConfig, num_removed: int, by: str, texts: Texts) -> tuple[int, ...]:
    """The layers to remove: with `by` `importance` those with the least costs, with `block` the contiguous ones that
    cost least together. Raises ConfigError for a model whose layers cannot be run one by one."""
    width = num_removed if by == "block" else 1
    costs = _costs(teacher, width, texts)
    order = sorted(range(len(costs)), key=lambda first: (costs[first], first))
    removed = range(order[0], order[0] + width) if by == "block" else sorted(order[:num_removed])
    _log(f"removed by {by}: layers {', '.join(map(str, removed))}")
    return tuple(removed)


def _costs(teacher: ModelConfig, width: int, texts: Texts) -> list[float]:
    """`removal_costs` a token, from the cache where they were measured before."""
    from filelock import FileLock

    key = f"{fingerprint(teacher)} {width} {[list(map(int, ids)) for ids in texts]}"
    name = os.path.basename(os.path.normpath(teacher.path))
    path = cache_dir() / "cuts" / f"{name}-layer-costs-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            costs = _measured(teacher, width, texts)
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps({"layers": width, "nats_per_token": dict(enumerate(costs))}, indent=1))
            beside.rename(path)
        costs = list(json.loads(path.read_text())["nats_per_token"].values())
    _log(f"mean KL of {name} to itself without {f'{width} layers' if width > 1 else 'a layer'}, nats a token, by layer")
    for start in range(0, len(costs), 10):
        print(f"{start:>6}: " + " ".join(f"{cost:7.3f}" for cost in costs[start : start + 10]), file=sys.stderr)
    return costs


def _measured(teacher: ModelConfig, width: int, texts: Texts) -> list[float]:
    from rich.console import Console
    from rich.progress import Progress

    # eager attention is right for every family; float32 on any machine
    options: dict[str, Any] = {"trust_remote_code": teacher.trust_remote_code, "revision": teacher.revision}
    model = load_model(teacher.path, dtype="float32", attn="eager", **options)
    with Progress(console=Console(stderr=True)) as progress:
        tracked = progress.track(texts, description="measuring layers, text by text")
        sums = [removal_costs(model, ids, width) for ids in tracked]
    costs = [sum(parts) / sum(map(len, texts)) for parts in zip(*sums, strict=True)]
    if not all(map(math.isfinite, costs)):
        raise ConfigError(f"{teacher.path}: without a layer it gives no finite logits; choose layers `by` even")
    return costs


def removal_costs(model: Any, ids: Sequence[int], width: int = 1) -> list[float]:
    """KL(p‖q), summed over the positions of a text: item i is that of removing layers i to i + width - 1.

    The layers below the removed ones run once for all items. Raises ConfigError for a model whose layers take more
    from each other than their hidden states.
    """
    import torch

    from switchkd.algo.divergence import forward_kl, per_row

    layers = list(model.get_submodule(layer_list(model)))
    batch = torch.tensor([list(ids)], device=model.device)

    def logits() -> Tensor:
        return model(input_ids=batch, use_cache=False).logits[0].float()

    with torch.inference_mode():
        with _recorded(layers) as calls:
            p_logits = logits()
        gap, half = math.inf, len(layers) // 2
        if len(calls) == len(layers):
            with _skipped(layers[:half], *calls[half]):  # no layer is removed: the same rows
                gap = float(per_row(forward_kl, p_logits, logits()).max())
        if gap > MAX_GAP:
            name = type(model).__name__
            raise ConfigError(f"{name}: its layers cannot be run one by one; list the layers, or choose them `by` even")
        sums = []
        for first in range(len(layers) - width + 1):
            with _skipped(layers[: first + width], *calls[first]):
                sums.append(float(per_row(forward_kl, p_logits, logits()).sum()))
    return sums


@contextmanager
def _recorded(layers: Sequence[Module]) -> Iterator[list[tuple[Tensor, tuple[Any, ...] | None]]]:
    """A list that receives a pair for each call of a layer: the hidden states that it takes, and the rest of its output
    where that is a tuple."""
    calls: list[tuple[Tensor, tuple[Any, ...] | None]] = []

    def record(_layer: Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], output[1:] if isinstance(output, tuple) else None))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(layers: Sequence[Module], hidden: Tensor, rest: tuple[Any, ...] | None) -> Iterator[None]:
    """Let layers return `hidden` without computing. Models read attributes of their layers, so these stay in place."""
    output = hidden if rest is None else (hidden, *rest)
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def layer_list(model: Any) -> str:
    """The name of the module list that holds the decoder's layers, such as `model.layers`. Raises ConfigError."""
    from torch.nn import ModuleList

    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [name for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module) == depth]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        lists_text = "no list" if not outer else f"several lists ({', '.join(outer)})"
        raise ConfigError(f"{type(model).__name__} has {lists_text} of {depth} layers; it cannot be pruned by depth")
    return outer[0]


def _log(text: str) -> None:
    print(f"switchkd: {text}", file=sys.stderr, flush=True)
