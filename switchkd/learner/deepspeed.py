"""One rank of the learner: DeepSpeed trains the student on rollouts. Only this file imports deepspeed.

In: a BatchAssignment and this rank's rollouts. Out: a StepResult, packed weights, checkpoints, a transformers folder.
All methods are collective: every rank calls them in the same order. After an error the process group is unusable: end
all its processes, start new ones with a new port and load the last checkpoint.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from switchkd.algo.noise import Purpose, noise_bits
from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import LearnerConfig
from switchkd.engines.models.lm_head import LMHead, LMHeadState
from switchkd.engines.weights import pack
from switchkd.learner.batching import Batch, LossSpec, collate, split_micro
from switchkd.learner.loss_module import StepLoss, full_tensors
from switchkd.learner.metrics import LossMetrics
from switchkd.learner.settings import LearnerSettings, deepspeed_config, param_groups
from switchkd.learner.student import build_student, export_student
from switchkd.types import BatchAssignment, PackedWeights, Rollout, StepResult


class DeepSpeedLearner:
    """One rank. `teacher_lm_heads` by teacher name, for rollouts with hidden states. Raises ConfigError where the
    student's weights are not finite."""

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        teacher_lm_heads: Mapping[str, LMHeadState],
    ) -> None:
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.device = _device(settings.student.device, local_rank)
        _set_environment(self.device, rank, world_size, master_addr, master_port)
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        _join(self.device, settings.learner.timeout_s)
        config = deepspeed_config(settings.learner, world_size)
        _seed(settings.seed, 0, Purpose.LORA_INIT)  # equal adapters on all ranks
        zero3 = config if config["zero_optimization"]["stage"] == 3 else None
        self.module = build_student(settings, zero3, self.device, self._gather)
        _seed(settings.seed, rank, Purpose.DROPOUT)  # different dropout on each rank
        self.engine = _initialize(self.module, settings.learner, config)
        _limit_waits(settings.learner.timeout_s)
        self.engine.train()
        self.teacher_lm_heads: dict[str, LMHead] = {
            name: LMHead.from_state(state, self.device) for name, state in teacher_lm_heads.items()
        }
        if self._diverged():
            raise ConfigError(f"student.path={settings.student.path}: its weights are not finite; take another model")

    def step(
        self, assignment: BatchAssignment, rollouts: Sequence[Rollout], *, loss: LossSpec, lr: float, version_after: int
    ) -> StepResult:
        """One optimizer step on this rank's share of the assignment, in any number of micro-batches.

        The loss is one sum over the tokens of all ranks with the assignment's denominators. Where the loss or the
        gradient is not finite all ranks skip the step: weights, optimizer and random state do not change. The result
        says whether weights diverged, also those of another rank.
        """
        start = time.monotonic()
        self._check_share(assignment, rollouts)
        before = _random_state(self.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        micro_batches = split_micro(rollouts, self.settings.learner.micro_batch_tokens)
        num_micro_batches = self._max_over_ranks(max(1, len(micro_batches)))  # some may be empty on this rank
        metrics = LossMetrics(self.device)
        for i in range(num_micro_batches):
            micro_batch = micro_batches[i] if i < len(micro_batches) else []
            batch = collate(micro_batch, self.settings.pad_id, needs_teacher=loss.needs_teacher).to(self.device)
            self._backward(batch, StepLoss(loss, assignment, batch), metrics, last=i == num_micro_batches - 1)
        grad_norm = self._update()
        skipped = not math.isfinite(grad_norm)
        if skipped:
            _set_random_state(before, self.device)
        return StepResult(
            step=assignment.step,
            version=version_after,
            loss=metrics.loss,
            grad_norm=grad_norm,
            lr=lr,
            num_loss_tokens=assignment.num_loss_tokens,
            time_s=time.monotonic() - start,
            skipped=skipped,
            diverged=self._diverged(),
            metrics={
                **metrics.means(),
                "loss/grad_norm": grad_norm,
                "loss/skipped": float(skipped),
                **_memory(self.device),
            },
        )

    def publish(self, version: int, dtype: str) -> PackedWeights | None:
        """The weights for the rollout workers, packed in `dtype` on rank 0, None on other ranks."""
        tensors = full_tensors(self.module.model, self._gather)
        if self.rank == 0:
            return pack(tensors, version, dtype=dtype)
        for _ in tensors:
            pass  # all ranks gather partitioned weights together
        return None

    def save(self, folder: Path, tag: str) -> None:
        """Write a checkpoint to folder/tag. Give a new tag each time: a used one keeps stale shards."""
        lora = self.settings.learner.lora is not None
        if not self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=lora):
            raise RuntimeError(f"DeepSpeed did not write checkpoint {folder}/{tag}")
        torch.save(_random_state(self.device), folder / tag / f"random_rank{self.rank}.pt")

    def load(self, folder: Path, tag: str) -> None:
        """Restore the state of `save`, on the same number of ranks. Raises ValueError for another number."""
        states = sorted((folder / tag).glob("random_rank*.pt"))
        if len(states) != self.world_size:
            raise ValueError(
                f"{folder / tag} is a checkpoint of {len(states)} ranks, the learner has {self.world_size}: "
                f"set learner.num_ranks to {len(states)}"
            )
        path, _ = self.engine.load_checkpoint(
            str(folder), tag=tag, load_lr_scheduler_states=False, load_module_strict=self.settings.learner.lora is None
        )
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {folder}/{tag}")
        state = folder / tag / f"random_rank{self.rank}.pt"
        _set_random_state(torch.load(state, weights_only=True), self.device)

    def export(self, folder: Path) -> None:
        """Write an ordinary transformers folder on rank 0, see `export_student`."""
        export_student(self.module.model, folder, self.settings.student.path, self._gather, write=self.rank == 0)

    def close(self) -> None:
        """Leave the process group. World size 1 keeps its group, so that the process can build another learner."""
        self.engine.destroy()
        if self.world_size > 1:
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()

    def _backward(self, batch: Batch, step_loss: StepLoss, metrics: LossMetrics, *, last: bool) -> None:
        """One backward call; before the `last` one the step's loss is known. A loss that is not finite gets a gradient
        that is not finite, whatever its derivative: DeepSpeed drops such a gradient in every ZeRO stage."""
        self.engine.set_gradient_accumulation_boundary(last)
        total = self.engine(batch, step_loss, self.teacher_lm_heads)
        metrics.add(batch, step_loss, total)
        factor = float(self.world_size)
        if last:
            metrics.sum_over_ranks()
            factor = factor if math.isfinite(metrics.loss) else math.nan
        self.engine.backward(total * factor)

    def _update(self) -> float:
        """Update the weights. Returns the gradient's norm before clipping; infinity where the gradient was dropped and
        nothing changed."""
        if self.engine.zero_optimization_stage() == 0:  # DeepSpeed then reports no norm and drops no gradient
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return math.inf
            self.engine.step()
            return norm
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm) and self.engine.was_step_applied():
            raise RuntimeError(
                f"the gradient's norm is {norm} and DeepSpeed trained on it: leave bf16.check_grad_overflow on in "
                "learner.deepspeed, and resume from the last checkpoint"
            )
        return norm if math.isfinite(norm) else math.inf

    def _diverged(self) -> bool:
        """Whether the Euclidean norm of the weights of any rank, in float32, is not finite. So is that of weights above
        1.8e19: their squares, and the student's own norms and attention scores, are infinite."""
        # under ZeRO-3 the part of this rank
        weights = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in self.module.parameters()]
        norm = float(torch.nn.utils.get_total_norm(weights))
        return bool(self._max_over_ranks(int(not math.isfinite(norm))))

    def _gather(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager:
        if self.settings.learner.zero_stage < 3 or not parameters:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def _max_over_ranks(self, num: int) -> int:
        """The largest `num` of all ranks."""
        largest = torch.tensor(num, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)

    def _check_share(self, assignment: BatchAssignment, rollouts: Sequence[Rollout]) -> None:
        if len(assignment.rollout_ids) != self.world_size:
            raise ValueError(
                f"step {assignment.step} is planned for {len(assignment.rollout_ids)} ranks of {self.world_size}"
            )
        received, planned = sorted(r.rollout_id for r in rollouts), sorted(assignment.rollout_ids[self.rank])
        if received != planned:
            raise ValueError(
                f"step {assignment.step}: rank {self.rank} got rollouts {received}, the plan says {planned}"
            )


def _seed(seed: int, index: int, purpose: Purpose) -> None:
    """Seed torch's random state of this process for one purpose."""
    torch.manual_seed(int(noise_bits(seed, index, 0, purpose, 1)[0]))


def _initialize(student: torch.nn.Module, learner: LearnerConfig, config: dict[str, Any]) -> Any:
    import deepspeed

    optimizer = torch.optim.AdamW(param_groups(student, learner.weight_decay), lr=0.0, betas=learner.betas, fused=True)
    return deepspeed.initialize(model=student, optimizer=optimizer, config=config, dist_init_required=False)[0]


class _Asked(dict[str, Any]):
    """A config that remembers which keys DeepSpeed looks for."""

    keys_asked: set[Any]

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def check_keys(learner: LearnerConfig) -> None:
    """Raise ConfigError for keys and values of `learner.deepspeed` that DeepSpeed does not take. It ignores unknown
    keys at the top level: known are those that it looks for."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else its import prints a warning
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.utils.logging import logger
    from pydantic import ValidationError

    logger.setLevel(logging.ERROR)
    asked = _Asked()
    asked.keys_asked = set()
    try:
        asked.update(deepspeed_config(learner, 1))
        DeepSpeedConfig(asked)
    except ValidationError as error:
        first, section = error.errors()[0], error.title
        name = str(first["loc"][-1]) if first["loc"] else section
        where = next((k for k, v in learner.deepspeed.items() if isinstance(v, dict) and name in v), section)
        model = _config_model(section)
        near = difflib.get_close_matches(name, model, n=1) if first["type"] == "extra_forbidden" else []
        hint = f"did you mean {near[0]!r}?" if near else first["msg"]
        raise ConfigError(
            f"learner.deepspeed.{where}.{name}={first['input']!r}: DeepSpeed refuses it: {hint}"
        ) from None
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as error:
        given = ", ".join(learner.deepspeed)
        raise ConfigError(f"learner.deepspeed ({given}): DeepSpeed refuses it: {first_line(error)}") from None
    for name in learner.deepspeed:
        if name not in asked.keys_asked:
            near = difflib.get_close_matches(name, map(str, asked.keys_asked), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see its documentation, or remove it"
            raise ConfigError(f"learner.deepspeed.{name}: DeepSpeed has no such key; {hint}")


def _config_model(name: str) -> list[str]:
    """The keys of DeepSpeed's section of this class name."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    waiting = [DeepSpeedConfigModel]
    while waiting:
        model = waiting.pop()
        if model.__name__ == name:
            return list(model.model_fields)
        waiting += model.__subclasses__()
    return []


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # a Ray actor sees its own GPU only, as 0


def _set_environment(device: torch.device, rank: int, world_size: int, addr: str, port: int) -> None:
    """Set the variables that DeepSpeed reads at its import. Trap: where one is missing, it tries mpi4py."""
    values: dict[str, object] = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": addr, "MASTER_PORT": port}
    values |= {"LOCAL_RANK": device.index or 0, "LOCAL_SIZE": world_size}  # LOCAL_RANK determines DeepSpeed's device
    os.environ.update({name: str(value) for name, value in values.items()})
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        if addr in ("127.0.0.1", "localhost"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.cuda.set_device(device)


def _join(device: torch.device, timeout_s: float) -> None:
    import deepspeed
    from deepspeed.utils.logging import logger
    from torch.distributed.rendezvous import register_rendezvous_handler

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # otherwise DeepSpeed compiles an extension for 50 s, or fails without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with suppress(RuntimeError):  # registered by an earlier learner of this process
        register_rendezvous_handler("switchkd", _rendezvous)
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        init_method="switchkd://",
    )


def _rendezvous(url: str, *, timeout: timedelta, **_: object) -> Iterator[tuple[torch.distributed.Store, int, int]]:
    """torch's `env://` with a store that listens on MASTER_ADDR alone. Trap: torch's own store listens on every
    interface, without authentication."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    addr, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family = socket.AF_INET6 if ":" in addr else socket.AF_INET
    fd = socket.create_server((addr, port), family=family).detach() if rank == 0 else None
    store = torch.distributed.TCPStore(
        addr, port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=fd
    )
    yield store, rank, world_size
    raise RuntimeError("ranks that were lost start again in new processes")


def _limit_waits(timeout_s: float) -> None:
    """Set the timeout of all groups. Trap: DeepSpeed creates groups with torch's default of half an hour."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"loss/peak_memory_gb": torch.cuda.max_memory_allocated(device) / 2**30}
