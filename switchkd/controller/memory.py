"""Computes the memory of each process of a run from the config and the models' shapes.

In: a config and `Shape`s. Out: bytes by part, for one process of each role. Formulas, with d = bytes of an element of
the role's dtype, P = parameters, T = trainable ones, V = shared vocabulary, D = the teacher's hidden width, G = ranks:

    teacher   weights d P; KV cache 2 d layers kv x sessions x columns; output matrix 4 V D where it must be in float32
              (it draws itself, or compresses rows); one forward pass of at most 4,096 tokens; on a CPU second copies
              of matrices (`prepack`). With vLLM: weights and cache
    worker    weights d P; KV cache with rollout.batch_size slots; its own output matrix 4 V h where d < 4; the
              teacher's, 4 V D; rows 4 V x rows x (block + 2 span + 3)
    learner   weights d P; gradients; float32 masters 4 T and Adam's two moments 8 T, each divided by G from ZeRO 1
              on; activations of one micro-batch; rows of one chunk; the teacher's output matrix, and the gradient of
              its own

A process's libraries (0.4 to 0.9 GiB) and a GPU's fragmentation are not in these numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from switchkd.algo.chunked_loss import CPU_ELEMENTS
from switchkd.algo.divergence import DEVICE_ELEMENTS
from switchkd.config.schema import Config
from switchkd.engines.build import device_of, max_len
from switchkd.engines.hf.kv_cache import round_up
from switchkd.engines.hf.model_runner import MAX_FORWARD_TOKENS
from switchkd.engines.models.cpu_prepack import MAX_BYTES, has_packed_product
from switchkd.engines.models.shape import BYTES, Shape
from switchkd.rollout.verify import VERIFY_COLUMNS

GIB = 2**30
FEW_COPIES = 9
"""Copies in float32 of the rows over which a loss and its gradient are computed at a time."""

Parts = dict[str, float]


def memory(config: Config, shapes: dict[str, Shape]) -> dict[str, Parts]:
    """Return bytes by role and part, of one process each."""
    parts = {"rollout": worker_memory(config, shapes), "learner": learner_memory(config, shapes)}
    return {"teacher": teacher_memory(config, shapes["teacher"]), **parts} if "teacher" in shapes else parts


def columns(config: Config) -> int:
    """Return the positions of one slot of a KV cache (engines/hf/kv_cache.py)."""
    return round_up(max_len(config) + 1)


def kv_cache(shape: Shape, slots: int, num_columns: int, dtype: str) -> float:
    """Return the bytes of the keys and values of all layers."""
    return 2.0 * BYTES[dtype] * shape.layers * shape.kv * slots * num_columns


def teacher_memory(config: Config, shape: Shape) -> Parts:
    section = config.teacher
    each = BYTES[section.dtype]
    # with `device_map` these are the sums over one replica's devices
    parts = {
        "weights": float(each * shape.params),
        "kv cache": kv_cache(shape, section.max_sessions, columns(config), section.dtype),
    }
    if section.backend == "vllm":  # needed of the share of the GPU that vLLM reserves
        return parts
    parts["forward pass"] = forward_pass(shape, columns(config), each)
    if section.output != "logits" and each < 4:
        parts["output matrix, float32"] = 4.0 * shape.head_params
    return parts | _packed(config, "teacher", shape, 4.0 * shape.head_params)


def worker_memory(config: Config, shapes: dict[str, Shape]) -> Parts:
    shape, rows = shapes["student"], config.rollout.batch_size
    each = BYTES[config.student.dtype]
    parts = {
        "weights": float(each * shape.params),
        "kv cache": kv_cache(shape, rows, columns(config), config.student.dtype),
        "forward pass": forward_pass(shape, columns(config), each, most=rows * config.data.max_prompt_tokens),
    }
    if each < 4:
        parts["output matrix, float32"] = 4.0 * shape.head_params
    if "teacher" in shapes and config.teacher.output == "hidden_states":
        parts["teacher's output matrix"] = 4.0 * shapes["teacher"].head_params
    heads = 4.0 * shape.head_params + parts.get("teacher's output matrix", 0.0)
    parts |= _packed(config, "rollout", shape, heads)
    # drafted rows that are kept, both models' rows of one window, and the copies of a draw
    block = config.rollout.max_draft_tokens
    on_cpu = not config.resources.rollout.num_gpus and device_of(config.student) == "cpu"
    window = min(VERIFY_COLUMNS, block) if on_cpu else block
    parts["rows"] = 4.0 * shape.vocab * rows * (block + 2 * window + 3)
    return parts


def _packed(config: Config, role: str, shape: Shape, heads: float) -> Parts:
    """Return bytes of packed copies of weight and output matrices on a CPU (engines/models/cpu_prepack.py)."""
    section = config.teacher if role == "teacher" else config.student
    resources = config.resources.teacher if role == "teacher" else config.resources.rollout
    if section.prepack == "off" or resources.num_gpus or device_of(section) != "cpu":
        return {}
    products = float(BYTES[section.dtype] * shape.products)
    if not has_packed_product(getattr(torch, section.dtype)) or (section.prepack == "auto" and products > MAX_BYTES):
        products = 0.0
    copies = products + (heads if has_packed_product(torch.float32) else 0.0)
    return {"packed copies": copies} if copies else {}


def forward_pass(shape: Shape, num_columns: int, each: int, most: int | None = None) -> float:
    """Return the bytes of the largest padded pass without gradients: a layer's widest tensors, and its mask."""
    tokens = min(MAX_FORWARD_TOKENS, most or MAX_FORWARD_TOKENS)
    widest = 3 * shape.width + max(2 * shape.attention + 2 * shape.kv, (3 if shape.gated else 2) * shape.ffn)
    groups = shape.attention // shape.kv
    return float(tokens * (each * widest + num_columns * (1 + groups)))


def learner_memory(config: Config, shapes: dict[str, Shape]) -> Parts:
    learner, shape = config.learner, shapes["student"]
    parts = {**states(config, shape), "activations": activations(config, shape)}
    if "teacher" in shapes and config.teacher.output == "hidden_states":
        parts["teacher's output matrix"] = 4.0 * shapes["teacher"].head_params
    parts["rows of a chunk"] = _chunk_space(config, shape)
    if not shape.trainable:  # summed over chunks in float32; with a 16-bit dtype also one chunk's
        each = 4.0 + (BYTES[learner.dtype] if learner.dtype != "float32" else 0)
        parts["gradient of the output matrix"] = each * shape.head_params
    return parts


def _chunk_space(config: Config, shape: Shape) -> float:
    """Return bytes of the teacher's rows in float32, the student's in its dtype, and copies of the rows in work."""
    chunk = float(config.learner.chunk_tokens * shape.vocab)
    on_cpu = not config.resources.learner.num_gpus and device_of("auto") == "cpu"
    few = max(CPU_ELEMENTS if on_cpu else DEVICE_ELEMENTS, shape.vocab)
    return (4 + BYTES[config.learner.dtype]) * chunk + 4 * FEW_COPIES * min(chunk, few)


def states(config: Config, shape: Shape) -> Parts:
    """Return weights, gradients and optimizer states of one rank at the optimizer step. In bfloat16 gradients are
    summed in float32, and ZeRO 1 holds those of the backward pass, 2 T, beside them. From ZeRO 1 on there are float32
    masters, also of float32 weights."""
    learner, ranks = config.learner, config.learner.num_ranks
    each, short = BYTES[learner.dtype], learner.dtype != "float32"
    stage = max(learner.zero_stage, 1) if short else learner.zero_stage
    trained = float(shape.trainable or shape.params)
    weights = float(each * (shape.params + shape.trainable))
    shared = ranks if stage >= 1 else 1
    zero: dict[str, Any] = learner.deepspeed.get("zero_optimization", {})
    bucket = min(float(zero.get("reduce_bucket_size", 50_000_000)), trained)
    parts = {
        "weights": weights / ranks if stage == 3 else weights,
        "gradients": 4 * trained / (ranks if stage >= 2 else 1) + (2 * trained if short and stage == 1 else 0),
        "masters": 4 * trained / shared if stage >= 1 else 0.0,
        "Adam": 8 * trained / shared,
        "buckets": each * bucket if stage >= 2 else 0.0,
    }
    if stage == 3:
        live = min(float(zero.get("stage3_max_live_parameters", 1e9)), float(shape.params))  # 1e9: ZeRO-3's default
        parts["gathered weights"] = each * live
    return {name: value for name, value in parts.items() if value}


def activations(config: Config, shape: Shape) -> float:
    """Return a micro-batch's activations before its backward pass: all of every layer, or with gradient checkpointing
    every layer's input and all of one layer. A single sequence may be longer than `micro_batch_tokens`."""
    longest = max_len(config)
    tokens = max(config.learner.micro_batch_tokens, longest)
    each = BYTES[config.learner.dtype]
    one = layer_activations(shape, longest, each)
    kept = each * shape.width * shape.layers + one if config.learner.gradient_checkpointing else one * shape.layers
    # the final norm, the embedding, and hidden states with their gradient before the output layer
    return tokens * (kept + (4 + 2 * each) * shape.width + 2 * each * shape.head_width)


def layer_activations(shape: Shape, length: int, each: int) -> float:
    """Return the bytes per token that autograd keeps of one decoder layer in sequences of `length`.

    Two norms: input and normalised input (float32 and d bytes; d and d in float32) and output; queries, keys and values
    repeated over the query heads, and the attention's output: 4 A; its log-sums and the norms' roots in float32; the
    additive mask's row; of the MLP both products, activation and their product: 4 ffn, 2 without a gate.
    """
    norms = 2 * ((4 + 2 * each) if each < 4 else 3 * each) * shape.width
    mlp = (4 if shape.gated else 2) * shape.ffn
    return norms + each * (4 * shape.attention + mlp + length) + 4 * shape.heads + 8


def checkpoint_bytes(config: Config, shape: Shape) -> float:
    """Return a checkpoint's bytes: weights, float32 masters, Adam's moments of all ranks, the student's folder."""
    trained = float(shape.trainable or shape.params)
    each = BYTES[config.learner.dtype]
    masters = 0.0 if config.learner.zero_stage == 0 and config.learner.dtype == "float32" else 4 * trained
    return each * trained + masters + 8 * trained + each * shape.params
