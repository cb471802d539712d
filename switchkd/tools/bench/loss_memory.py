"""Times the loss of a step in three forms: switchkd's in chunks, naive with whole rows of logits, TRL's in tiles.

In: a random student, a random teacher's last hidden states and output matrix, sizes. Out: seconds of forward and
backward pass, peak memory beyond weights and gradients, and the distance of the gradients. All forms compute the mean
forward KL over the same tokens of the same model.

Shapes: B sequences, T completion tokens of each, N = B x T, D hidden width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.config.errors import ConfigError
from switchkd.tools.bench.subprocess_side import BenchProcess, Repeats, measure_processes
from switchkd.tools.bench.table import Options, Table

if TYPE_CHECKING:
    import torch

    from switchkd.types import Rollout

    Step = Callable[[], torch.Tensor]

OURS, NAIVE, TRL = "switchkd (chunks)", "naive (whole rows)", "TRL (tiles)"
ALONE = "model alone"
PROMPT_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCase:
    """One size, and the folder for the sides' gradients."""

    tokens: int  # T
    vocab: int
    folder: str
    options: Options
    batch: int = 4
    width: int = 576  # SmolLM2-135M's
    layers: int = 2
    chunk: int = 256  # learner.chunk_tokens by default

    @property
    def num(self) -> int:
        return self.batch * self.tokens


SIZES = ((128, 16_384), (256, 16_384), (512, 16_384), (256, 8_192), (256, 49_152))


def run(options: Options) -> Table:
    """Measure all forms for each size. Raises ConfigError without TRL."""
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("the peer of this bench, TRL, is not installed: pip install 'switchkd[bench]'")
    rows: list[dict[str, Any]] = []
    small: Any = {"batch": 2, "width": 32, "chunk": 4} if options.smoke else {}
    for tokens, vocab in ((16, 256),) if options.smoke else SIZES:
        with tempfile.TemporaryDirectory(prefix="switchkd-bench-") as folder:
            job = MemoryCase(tokens=tokens, vocab=vocab, folder=folder, options=options, **small)
            rows += _measure(job)
    notes = options.notes(batch=job.batch, width=job.width, layers=job.layers, chunk_tokens=job.chunk)
    return Table(title="Loss and gradient of one step", rows=rows, notes=notes, remarks=REMARKS)


REMARKS = (
    "Memory: the most that a step takes beyond weights and their gradients, which are there before. Beside it, what "
    "one copy of the logits of both models would take. `model alone` has no output layer and no loss: the activations.",
    "Gradient: the largest relative distance of any parameter's gradient from the naive one, in the Euclidean norm.",
)


def _measure(job: MemoryCase) -> list[dict[str, Any]]:
    forms: dict[str, Callable[..., Step]] = {OURS: ours, NAIVE: naive, TRL: trl, ALONE: alone}
    where: Any = {"device": job.options.device, "threads": job.options.threads}
    sides = [BenchProcess(name, work, job, name, form, **where) for name, form in forms.items()]
    pairs, reports = measure_processes(sides, job.options.repeats)
    return [
        {
            "T": job.tokens,
            "V": job.vocab,
            "form": name,
            "s/step": pairs.spread[name],
            "time / ours": pairs.ratios[name],
            "peak memory, MiB": report["peak_mb"],
            "logits of both, MiB": 2 * 4 * job.num * job.vocab / 2**20,
            "gradient": None if name == ALONE else distance(job, name, NAIVE),
            "loss": None if name == ALONE else report["loss"],
        }
        for name, report in reports.items()
    ]


def distance(job: MemoryCase, name: str, other: str) -> float:
    """Return the largest relative distance between the gradients that two sides have written."""
    import torch

    grads, base = (torch.load(_file(job, side), weights_only=True, mmap=True) for side in (name, other))
    assert grads.keys() == base.keys()
    return max(float((grads[key].float() - base[key]).norm() / base[key].float().norm()) for key in grads)


def _file(job: MemoryCase, name: str) -> Path:
    return Path(job.folder) / f"{name.split()[0]}.pt"


def work(repeats: Repeats, job: MemoryCase, name: str, form: Callable[..., Step]) -> None:
    """Run one side; the first repeat, a warm-up, also writes the gradients to a file."""
    import torch

    model, teacher, head = _models(job)
    step = form(job, model, teacher, head)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    repeats.count_memory_from_here()
    for _ in repeats:
        model.zero_grad(set_to_none=False)
        loss = step()
        loss.backward()
        if "loss" not in repeats.reported:
            grads = {key: p.grad.detach().cpu() for key, p in parameters.items() if p.grad is not None}
            torch.save(grads, _file(job, name))
            repeats.report(loss=float(loss))
            del grads
        del loss


def _models(job: MemoryCase) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the student, the teacher's hidden states [N, D] and its output matrix [V, D], equal on all sides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, job.width // 64)
    config = LlamaConfig(
        vocab_size=job.vocab, hidden_size=job.width, intermediate_size=8 * job.width // 3, tie_word_embeddings=True,
        num_hidden_layers=job.layers, num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=None,
        eos_token_id=None, max_position_embeddings=PROMPT_TOKENS + job.tokens,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to(device=job.options.device, dtype=getattr(torch, job.options.dtype)).train()
    teacher = torch.randn(job.num, job.width).to(model.dtype)
    head = (torch.randn(job.vocab, job.width) / job.width**0.5).to(model.dtype)
    return model, teacher.to(job.options.device), head.to(job.options.device)


def _ids(job: MemoryCase) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(job.vocab, (job.batch, PROMPT_TOKENS + job.tokens), generator=generator)


# --- the forms: each returns a step that returns the mean loss ----------------------------------------------------


def ours(job: MemoryCase, model: Any, teacher: torch.Tensor, head: torch.Tensor) -> Step:
    """Return the learner's step: collate the rollouts, and compute the loss with `StudentModule`."""
    from switchkd.algo.losses import forward_kl
    from switchkd.engines.models.lm_head import LMHead
    from switchkd.learner.batching import LossSpec, assign_batch, collate
    from switchkd.learner.loss_module import StepLoss, StudentModule

    rollouts = _rollouts(job, teacher)
    batch = collate(rollouts, pad_id=0).to(job.options.device)
    plan = assign_batch(0, 0, rollouts, num_ranks=1)
    module = StudentModule(model, vocab_size=job.vocab, scale=1.0, softcap=0.0, chunk=job.chunk)
    heads = {"": LMHead(head)}
    spec = LossSpec(name="forward_kl", per_token=forward_kl)
    return lambda: module(batch, StepLoss(spec, plan, batch), heads)


def _rollouts(job: MemoryCase, teacher: torch.Tensor) -> list[Rollout]:
    import numpy as np

    from switchkd.engines.wire import to_numpy
    from switchkd.types import CompletionSource, Ragged, Rollout, TeacherOutput

    values, dtype = to_numpy(teacher.cpu())
    ids, num = _ids(job).numpy().astype(np.int32), job.tokens
    zeros = np.zeros(num, np.float32)
    return [
        Rollout(
            rollout_id=i,
            batch=0,
            stage=0,
            prompt_id="",
            completion_source=CompletionSource.ROLLOUT,
            prompt_ids=row[:PROMPT_TOKENS],
            token_ids=row[PROMPT_TOKENS:],
            sources=np.zeros(num, np.uint8),
            weight_versions=np.zeros(num, np.int32),
            statistic=zeros,
            threshold=zeros,
            uncertainty=zeros,
            finish_reason="length",
            teacher_output=TeacherOutput(
                kind="hidden_states", dtype=dtype, rows=Ragged.concat([values[i * num : (i + 1) * num]])
            ),
        )
        for i, row in enumerate(ids)
    ]


def naive(job: MemoryCase, model: Any, teacher: torch.Tensor, head: torch.Tensor) -> Step:
    """Return a step with the loss in plain torch; only completions have rows of logits."""
    from torch.nn.functional import kl_div, linear, log_softmax

    ids = _ids(job).to(job.options.device)

    def step() -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
        q = log_softmax(model.lm_head(hidden).float().flatten(0, 1), -1)
        p = log_softmax(linear(teacher, head).float(), -1)
        return kl_div(q, p, log_target=True, reduction="sum") / job.num

    return step


def alone(job: MemoryCase, model: Any, teacher: torch.Tensor, head: torch.Tensor) -> Step:
    """Return a step of the model below its output layer with a trivial loss: the lower limit of every form."""
    ids = _ids(job).to(job.options.device)

    def step() -> torch.Tensor:
        hidden: torch.Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.float().square().mean()

    return step


def trl(job: MemoryCase, model: Any, teacher: torch.Tensor, head: torch.Tensor) -> Step:
    """Return a step with the loss of `trl.DistillationTrainer` from hidden states on, at beta 0 (forward KL)."""
    import torch

    try:  # private to TRL
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as divergence
    except ImportError as error:
        raise ConfigError(f"this TRL has no chunked divergence ({error}); install trl 1.16") from None
    ids = _ids(job).to(job.options.device)
    mask = torch.ones(job.batch, job.tokens, dtype=torch.long, device=job.options.device)
    states = teacher.view(job.batch, job.tokens, job.width)

    def step() -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]
        loss, _, _ = divergence(hidden, states, model.lm_head.weight, head, mask, beta=0.0)
        return torch.as_tensor(loss)

    return step
