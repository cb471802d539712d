"""One rank of the learner: fetches its rollouts itself and trains on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.config import resources
from switchkd.config.schema import Config
from switchkd.engines.build import make_tokenizer
from switchkd.engines.models.loading import pad_id, shared_vocab
from switchkd.learner.fake import FakeRank
from switchkd.types import BatchAssignment, PackedWeights, Rollout, StepResult

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState
    from switchkd.learner.batching import LossSpec
    from switchkd.learner.settings import LearnerSettings

Fetch = Callable[[list[int]], list[Rollout]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """A rank's number and how it finds the others."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0


def learner_settings(config: Config) -> LearnerSettings:
    """The settings of every rank, from the config and the student's tokenizer."""
    from switchkd.learner.settings import LearnerSettings

    tokenizer = make_tokenizer(config.student)
    return LearnerSettings(
        learner=config.learner,
        student=config.student,
        vocab_size=shared_vocab(tokenizer),
        pad_id=pad_id(tokenizer),
        threads=resources.of_role(config, "learner").threads or 0,
        seed=config.seed,
    )


def make_rank(
    config: Config, rank_info: RankInfo, lm_heads: dict[str, LMHeadState], fetch: Fetch
) -> LearnerRank | FakeRank:
    match config.learner.backend:
        case "deepspeed":
            return LearnerRank(config, rank_info, lm_heads, fetch)
        case "fake":
            return FakeRank(config, rank_info.rank, fetch)


class LearnerRank:
    """One rank of the learner: fetches its rollouts itself, so that the driver never touches them."""

    def __init__(self, config: Config, rank_info: RankInfo, lm_heads: dict[str, LMHeadState], fetch: Fetch) -> None:
        from switchkd.learner.build import build_loss
        from switchkd.learner.deepspeed import DeepSpeedLearner

        self.config = config
        self.rank_info = rank_info
        self.fetch = fetch
        self.losses: list[LossSpec] = [build_loss(stage) for stage in config.train.stages]
        self.learner = DeepSpeedLearner(
            learner_settings(config),
            rank=rank_info.rank,
            local_rank=rank_info.local_rank,
            world_size=rank_info.world_size,
            master_addr=rank_info.master_addr,
            master_port=rank_info.master_port,
            teacher_lm_heads=lm_heads,
        )

    def step(self, assignment: BatchAssignment, lr: float) -> StepResult:
        rollouts = self.fetch(list(assignment.rollout_ids[self.rank_info.rank]))
        return self.learner.step(
            assignment, rollouts, loss=self.losses[assignment.stage], lr=lr, version_after=assignment.step + 1
        )

    def publish(self, version: int) -> PackedWeights | None:
        """Rank 0 answers with the packed weights, in the dtype that the rollout workers run."""
        return self.learner.publish(version, self.config.student.dtype)

    def save(self, folder: Path, tag: str) -> None:
        try:
            self.learner.save(folder, tag)
        except RuntimeError as error:  # torch raises it for a full disk
            raise OSError(f"{folder} could not be written: {error}") from error

    def load(self, folder: Path, tag: str) -> None:
        self.learner.load(folder, tag)

    def export(self, folder: Path) -> None:
        """A transformers folder; rank 0 adds the tokenizer."""
        self.learner.export(folder)
        if self.rank_info.rank == 0:
            make_tokenizer(self.config.student).save_pretrained(folder)

    def close(self) -> None:
        self.learner.close()
