"""The loss metrics of one optimizer step, summed over micro-batches and ranks.

In: each micro-batch with its StepLoss after the forward pass. Out: the loss and named means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchkd.learner.batching import Batch
from switchkd.learner.loss_module import StepLoss
from switchkd.types import TokenSource

_SOURCES = {TokenSource.STUDENT: "loss/student", TokenSource.TEACHER: "loss/teacher", TokenSource.DATA: "loss/data"}


class LossMetrics:
    """Sums and counts in one float64 tensor, so that one small message sums over the ranks."""

    def __init__(self, device: torch.device) -> None:
        self._names = ["loss/total", "loss/padding_frac", "loss/kl", "loss/lm", *_SOURCES.values()]
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64, device=device)  # of values, of counts

    @property
    def loss(self) -> float:
        return float(self._sums[0, 0])

    def add(self, batch: Batch, step_loss: StepLoss, total: Tensor) -> None:
        self._put("loss/total", total.detach()[None])
        self._put("loss/padding_frac", batch.attention_mask == 0)
        per_token, kl, lm = (step_loss.recorded(name) for name in ("loss", "kl", "lm"))
        if per_token is not None:
            for source, name in _SOURCES.items():
                self._put(name, per_token, batch.sources == source)
        if kl is not None:
            self._put("loss/kl", kl)
        if lm is not None:
            self._put("loss/lm", lm, batch.sources == TokenSource.DATA)

    def sum_over_ranks(self) -> None:
        torch.distributed.all_reduce(self._sums)
        self._sums = self._sums.cpu()

    def means(self) -> dict[str, float]:
        """Means over the step's tokens, and the sum for `loss/total`; names without a token are left out."""
        sums, counts = self._sums.tolist()
        means = {name: total / n for name, total, n in zip(self._names, sums, counts, strict=True) if n}
        return means | {"loss/total": self.loss}

    def _put(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        mask = torch.ones_like(values, dtype=torch.bool) if where is None else where
        index = self._names.index(name)
        self._sums[0, index] += torch.where(mask, values, 0).sum(dtype=torch.float64)
        self._sums[1, index] += mask.sum()
