"""The student as a transformers model with a slot cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from switchkd.engines.hf.cuda_graphs import Capture
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.models import cpu_prepack
from switchkd.engines.models.lm_head import lm_head_of
from switchkd.engines.weights import load_into
from switchkd.types import PackedWeights


class HFStudent:
    """The student (a StudentEngine): a ModelRunner with a float32 LM head and replaceable weights."""

    def __init__(self, model: Any, *, num_slots: int, max_len: int, vocab_size: int, prefill_chunk: int = 512,
                 capture: Capture | None = None, prepack: str = "auto") -> None:  # fmt: skip
        self._slots = ModelRunner(
            model, num_slots=num_slots, max_len=max_len, prefill_chunk=prefill_chunk, capture=capture
        )
        self.model, self.num_slots, self.max_len = model, num_slots, max_len
        self.order = (0, 0)
        self.head = lm_head_of(model, vocab_size)
        prepack = "off" if capture else prepack  # a graph keeps addresses, packed copies move
        self._refresh = cpu_prepack.prepack(model, prepack, key="student.prepack")
        if prepack != "off":
            self.head.prepack()

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """See StudentEngine."""
        return self._slots.extend(slots, starts, token_ids, lengths)

    def load_weights(self, packed: PackedWeights) -> None:
        """See StudentEngine. Every slot is empty afterwards; `head` stays the same object."""
        load_into(self.model, packed)
        self._refresh()
        self.head.copy_from(self.model)
        self._slots.reset()
        self.order = packed.order
