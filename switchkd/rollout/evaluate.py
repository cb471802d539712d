"""The student alone, beside the teacher: the rows of an evaluation."""

from __future__ import annotations

from switchkd.algo import switching
from switchkd.algo.sampling import Purpose, Sampling
from switchkd.rollout.state import Mode


def eval_mode(*, temperature: float, max_new_tokens: int, seed: int) -> Mode:
    """The student alone, unscored, with draws of evaluation's own purpose."""
    return Mode(
        rule=switching.student(),
        student=Sampling(temperature=temperature),
        teacher=Sampling(),
        max_new_tokens=max_new_tokens,
        seed=seed,
        purpose=Purpose.EVAL,
        scored=False,
    )
