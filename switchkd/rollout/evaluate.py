"""The student alone, beside the teacher: the rows of an evaluation."""

from __future__ import annotations

from switchkd.algo import switching
from switchkd.algo.sampling import Purpose, SamplingParams
from switchkd.rollout.state import RolloutParams


def eval_params(*, temperature: float, max_new_tokens: int, seed: int) -> RolloutParams:
    """The student alone, unscored, with draws of evaluation's own purpose."""
    return RolloutParams(
        rule=switching.student(),
        student=SamplingParams(temperature=temperature),
        teacher=SamplingParams(),
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose=Purpose.EVAL,
        scored=False,
    )
