"""Models and prompts that all sides of a bench share.

In: the command line's teacher and student. Out: two folders, and the same prompts for all sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DepthPruneConfig, TeacherConfig
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.sources import check_model_folder

TOPICS = (
    "a river", "the moon", "an old clock", "bread", "a library", "winter", "a bridge", "the ocean", "a small garden",
    "glass", "a mountain village", "the alphabet", "rain", "a lighthouse", "honey", "a train journey",
)  # fmt: skip
INSTRUCTIONS = (
    "Explain in a few sentences what people should know about {}.",
    "Write a short story about {}.",
    "List five facts about {} and say which one surprises you most.",
    "Describe {} to a reader who has never seen it.",
)
MAX_PROMPTS = len(TOPICS) * len(INSTRUCTIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolders:
    teacher: str
    student: str


def resolve(teacher: str, student: str) -> ModelFolders:
    """Fetch and prune the models where necessary. Raises ConfigError for a model that does not exist."""
    teacher = resolve_path(teacher)
    check_model_folder(teacher, "--teacher")
    if student.isdigit():
        from switchkd.engines.models.resolve import prune_student

        prune = DepthPruneConfig(num_layers=int(student), by="even")  # as the students of the published tables
        student = str(prune_student(TeacherConfig(path=teacher), prune, ()))
    check_model_folder(student, "--student")
    return ModelFolders(teacher=teacher, student=student)


def prompts(num: int) -> list[str]:
    """Return the first `num` of a fixed list of instructions of similar length. Raises ConfigError."""
    if num > MAX_PROMPTS:
        raise ConfigError(f"--prompts {num}: there are {MAX_PROMPTS}; ask for fewer")
    return [instruction.format(topic) for instruction in INSTRUCTIONS for topic in TOPICS][:num]
