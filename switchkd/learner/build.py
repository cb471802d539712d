"""The loss of a stage, by its name in the config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from switchkd.algo import losses, topk_losses
from switchkd.config.schema import StageConfig
from switchkd.config.user_code import check_params, given_params, load_user_function
from switchkd.learner.batching import LossSpec

_LOSSES: dict[str, Callable[..., Any]] = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "jsd": losses.jsd,
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "tvd": losses.tvd,
    "cross_entropy": losses.cross_entropy,
    "atkd": losses.atkd_tokens,
}

_LOSS_KEYS = {
    "jsd": ("beta",),
    "skew_kl": ("alpha",),
    "skew_reverse_kl": ("alpha",),
    "atkd": ("hard_frac", "lam", "direction"),
}


def build_loss(stage: StageConfig) -> LossSpec:
    """The stage's loss. Raises ConfigError that names a parameter it does not take."""
    kind = stage.loss.type
    params = given_params(stage.loss, _LOSS_KEYS)
    hard_frac = params.pop("hard_frac", 0.5) if kind == "atkd" else None
    per_token = _LOSSES.get(kind) or load_user_function(kind, "loss")
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
