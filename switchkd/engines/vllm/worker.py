"""switchkd's extension of vLLM's workers: reads hidden states, and draws tokens with keyed noise.

vLLM imports this module by name, once in each of its worker processes (with one worker: in the teacher's process). In:
a request's `extra_args["switchkd"]`. Out: the final hidden states of the requested positions, by the request's key,
which vLLM's model runners keep between the forward pass and the draw; and the drawn tokens.

vLLM has two model runners. Both split a step into `execute_model` and `sample_tokens` with `execute_model_state`
between; they differ in the batch's order and in their logits processors. Both are supported.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw
from switchkd.algo.topk import compress_packed
from switchkd.engines.models.lm_head import LMHead, LMHeadState
from switchkd.engines.wire import from_numpy, to_numpy

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as NewerLogitsProcessor
except ImportError:  # a vLLM without the newer runner
    _PROCESSORS: tuple[type, ...] = (LogitsProcessor,)
else:
    _PROCESSORS = (LogitsProcessor, NewerLogitsProcessor)

OURS = "switchkd"
"""The key of a request's {key, first, draw} in its `extra_args`."""


class HiddenStateCapture:
    """Wraps the two halves of a model runner's step and keeps the requested hidden states."""

    def __init__(self, runner: Any, keeps: bool) -> None:
        for name in ("execute_model", "sample_tokens", "execute_model_state"):
            if not hasattr(runner, name):
                raise RuntimeError(
                    f"vLLM's model runner {type(runner).__name__} has no {name}: it hands out no hidden states; "
                    "take teacher.backend: hf"
                )
        self.runner, self.keeps = runner, keeps
        self.lm_head: LMHead | None = None
        self.rows: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)  # by key: first position, [n, D]
        self.last: dict[int, torch.Tensor] = {}  # by slot: the hidden state that this step's token is drawn from
        self._requests: dict[str, dict[str, Any]] = {}  # by vLLM's request id
        self._spans: dict[str, tuple[int, int]] = {}  # positions of this step: first, number
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute, self.sample

    def execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduled.finished_req_ids:
            self._requests.pop(request_id, None)
        starts = dict(
            zip(scheduled.scheduled_cached_reqs.req_ids, scheduled.scheduled_cached_reqs.num_computed_tokens,
                strict=True)
        )  # fmt: skip
        for new in scheduled.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            if new.sampling_params is not None and (ours := (new.sampling_params.extra_args or {}).get(OURS)):
                self._requests[new.req_id] = ours
        self._spans = {i: (starts[i], num) for i, num in scheduled.num_scheduled_tokens.items()}
        return self._execute(scheduled, *args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        state = self.runner.execute_model_state
        if state is not None and state.hidden_states is not None:
            self._keep_rows(state)
        return self._sample(*args, **kwargs)

    def _keep_rows(self, state: Any) -> None:
        batch = getattr(state, "input_batch", None)  # the newer runner's: its slots are not indices in the batch
        ids = list((batch or self.runner.input_batch).req_ids)
        slots = range(len(ids)) if batch is None else batch.idx_mapping_np.tolist()
        self.last, start = {}, 0
        for slot, request in zip(slots, ids, strict=False):
            first, num = self._spans[request]
            rows = state.hidden_states[start : start + num]
            start += num
            self.last[slot] = rows[-1]
            request_rows = self._requests.get(request)
            skipped = 0 if request_rows is None else max(request_rows["first"] - first, 0)
            if request_rows is not None and self.keeps and skipped < num:  # a copy: the runner reuses the buffer
                self.rows[request_rows["key"]].append((first + skipped, rows[skipped:].clone()))

    def pop_rows(self, key: str) -> tuple[int, torch.Tensor] | None:
        """First position and rows [n, D] of a request; the later row of a position that was read twice."""
        parts = self.rows.pop(key, [])
        if not parts:
            return None
        first = min(at for at, _ in parts)
        rows = parts[0][1].new_empty(max(at + len(part) for at, part in parts) - first, parts[0][1].shape[1])
        for at, part in parts:
            rows[at - first : at - first + len(part)] = part
        return first, rows


_capture: HiddenStateCapture | None = None
_margins: dict[str, dict[int, float]] = defaultdict(dict)  # by key: by completion index


class RowReader:
    """vLLM's worker extension: methods of the worker for `collective_rpc`. They return bytes, since not every executor
    can return arrays."""

    model_runner: Any

    def switchkd_watch(self) -> None:
        """Start the capture, before the first request. Raises RuntimeError for an unknown model runner."""
        global _capture
        _capture = HiddenStateCapture(self.model_runner, keeps=get_tensor_model_parallel_rank() == 0)

    def switchkd_leave(self) -> None:
        """End the capture, before another engine of this process starts."""
        global _capture
        _capture = None

    def switchkd_head(self, state: bytes) -> None:
        """Set the LM head for compression and draws (for a float32 model its logits are vLLM's own)."""
        assert _capture is not None
        lm_head_state: LMHeadState = pickle.loads(state)
        _capture.lm_head = LMHead.from_state(lm_head_state, device=self.model_runner.device)

    def switchkd_take(self, keys: list[str]) -> bytes:
        """Rows and margins of finished requests: a list of (first position, values, dtype, margins); empty on workers
        without rows."""
        assert _capture is not None
        # pop all requests first: workers without rows have margins too
        captured = [(_capture.pop_rows(key), _margins.pop(key, {})) for key in keys]
        answers = [
            (rows[0], *to_numpy(rows[1]), [margins[i] for i in sorted(margins)])
            for rows, margins in captured
            if rows is not None
        ]
        return pickle.dumps(answers) if len(answers) == len(keys) else b""

    @torch.inference_mode()
    def switchkd_logits(self, rows: bytes) -> bytes:
        """The model's logits [n, its vocabulary] of hidden states; empty where a worker has none."""
        hidden = _on(self.model_runner.device, rows)
        logits = self.model_runner.get_model().compute_logits(hidden)
        return b"" if logits is None else pickle.dumps(logits.float().cpu().numpy())

    @torch.inference_mode()
    def switchkd_compress(self, rows: bytes, k: int) -> bytes:
        """Hidden states to packed top-k rows (`algo/topk.py`); on the first worker only."""
        assert _capture is not None
        if not _capture.keeps or _capture.lm_head is None:
            return b""
        hidden = _on(self.model_runner.device, rows)
        return pickle.dumps(compress_packed(_capture.lm_head.logits, hidden, k).cpu().numpy())


class KeyedDraws(*_PROCESSORS):  # type: ignore[misc]
    """A logits processor of both model runners: leaves the token that `algo.sampling.draw` draws as the only one.

    Requests run at temperature 0, so that vLLM chooses that token. Where hidden states are captured and the model is
    not float32, the draw is from float32 logits, as in a worker that rebuilds them.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.draws: dict[int, _Draw] = {}  # by slot

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Accept all: `extra_args` comes from `vllm/teacher.py`."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The older runner's interface: slots are indices in the batch; `output` grows with the request."""
        process_dict_updates(self.draws, batch_update, lambda params, _, output: _Draw.of(params, output))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """The newer runner's interface."""
        self.draws.pop(req_idx, None)
        if (made := _Draw.of(sampling_params, None)) is not None:
            self.draws[req_idx] = made
        return made is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Replace logits [rows, vocabulary], one row a request; `ctx` is the newer runner's."""
        slots = list(range(len(logits))) if ctx is None else ctx.expanded_idx_mapping.tolist()
        reads = [None] * len(slots) if ctx is None else (ctx.pos + 1).tolist()
        drawing = [(row, slot) for row, slot in enumerate(slots) if slot in self.draws]
        groups: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
        for row, slot in drawing:
            groups[self.draws[slot].settings].append((row, slot))
        for (run_seed, purpose, *shape), members in groups.items():
            draws = [self.draws[slot] for _, slot in members]
            indices = [each.index(reads[row]) for each, (row, _) in zip(draws, members, strict=True)]
            tokens, margins = draw(
                _rows_to_draw(logits, members, draws[0].vocab_size), run_seed=run_seed, purpose=Purpose(purpose),
                rollout_ids=[each.rollout_id for each in draws],
                positions=[each.position + index for each, index in zip(draws, indices, strict=True)],
                sampling=SamplingParams(temperature=shape[0], top_p=shape[1], top_k=shape[2]), return_margin=True,
            )  # fmt: skip
            rows = torch.tensor([row for row, _ in members], device=logits.device)
            logits[rows] = -torch.inf
            logits[rows, torch.from_numpy(tokens).to(logits.device)] = 0.0
            if _capture is not None:
                for each, index, margin in zip(draws, indices, margins, strict=True):
                    _margins[each.key][index] = float(margin)
        return logits


class _Draw:
    """The parameters of one request's draws."""

    def __init__(self, ours: dict[str, Any], output: list[int] | None) -> None:
        draw = ours["draw"]
        self.key: str = ours["key"]
        self.settings = tuple(draw[name] for name in ("run_seed", "purpose", "temperature", "top_p", "top_k"))
        self.rollout_id, self.position = draw["rollout_id"], draw["position"]
        self.vocab_size, self.num_prompt = draw["vocab_size"], draw["num_prompt"]
        self._output = output

    @classmethod
    def of(cls, params: Any, output: list[int] | None) -> _Draw | None:
        ours = (params.extra_args or {}).get(OURS)
        return cls(ours, output) if ours and ours.get("draw") else None

    def index(self, num_read: int | None) -> int:
        """The number of tokens written before this one."""
        return len(self._output or ()) if num_read is None else num_read - self.num_prompt


def _on(device: torch.device, rows: bytes) -> torch.Tensor:
    """Received hidden states, on the model's device."""
    values, dtype = pickle.loads(rows)
    return from_numpy(values, dtype, device)


def _rows_to_draw(logits: torch.Tensor, members: list[tuple[int, int]], vocab_size: int) -> torch.Tensor:
    """Float32 logits [n, V] of the members (row, slot)."""
    if _capture is not None and _capture.lm_head is not None:
        return _capture.lm_head.logits(torch.stack([_capture.last[slot] for _, slot in members]))
    return logits[[row for row, _ in members], :vocab_size].float()
