"""The stage's loss, by its name in the config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from switchkd.algo import losses, topk_losses
from switchkd.config.schema import StageConfig
from switchkd.config.user_code import check_params, given_params, load_user_function
from switchkd.learner.batching import LossSpec

if TYPE_CHECKING:
    pass


_LOSS_KEYS = {
    "jsd": ("beta",),
    "skew_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "atkd": ("hard_frac", "lam", "direction"),
}


def build_loss(stage: StageConfig) -> LossSpec:
    """The stage's loss. Raises ConfigError naming the parameter that it refuses."""
    kind = stage.loss.type
    every = sorted({key for keys in _LOSS_KEYS.values() for key in keys})
    params = given_params(stage.loss, kind, _LOSS_KEYS.get(kind, ()), every) | stage.loss.params
    hard_frac = params.pop("hard_frac", 0.5) if kind == "atkd" else None
    per_token = _loss_function(kind)
    check_params(per_token, f"loss {kind}", params)
    return LossSpec(
        name=kind,
        per_token=per_token,
        numbers=params,
        hard_frac=hard_frac,
        lm_coef=stage.loss.lm_coef,
        needs_teacher=kind != "cross_entropy",
        tail=topk_losses.atkd_tokens if kind == "atkd" else partial(topk_losses.coarse, per_token),
    )


def _loss_function(kind: str) -> Callable[..., Any]:
    match kind:
        case "forward_kl":
            return losses.forward_kl
        case "reverse_kl":
            return losses.reverse_kl
        case "jsd":
            return losses.jsd
        case "skew_kl":
            return losses.skew_kl
        case "skew_reverse_kl":
            return losses.skew_reverse_kl
        case "tvd":
            return losses.tvd
        case "cross_entropy":
            return losses.cross_entropy
        case "atkd":
            return losses.atkd_tokens
        case _:
            return load_user_function(kind, "loss")
