"""Compiles every Triton kernel for a GPU of compute capability 9.0, without one: `test_kernels.py` runs this file."""

import itertools

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from switchkd.algo.kernels import divergence, draw

STRIDES = {"vocab": "i32", "stride": "i32", "p_stride": "i32", "q_stride": "i32"}


def compiled(kernel, types: dict[str, str], **constants) -> None:
    known = {**types, **STRIDES, "seed_low": "i32", "seed_high": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, {name: known[name] for name in kernel.arg_names}, constexprs=constants)
    options = {"num_warps": 16, "enable_fp_fusion": False}
    assert compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    print(kernel.__name__, types, constants)


if __name__ == "__main__":
    keys = {"rollout_ids": "*i64", "positions": "*i64", "tokens": "*i64", "margins": "*fp64"}
    same = {"PURPOSE": 2, "NEAR_TIE": 1e-4, "TIE": 1e-12, "BLOCK": 4096}
    for dtype, (temperature, top_k, top_p) in (
        ("*bf16", (0.0, 0, 1.0)),
        ("*fp32", (1.0, 0, 1.0)),
        ("*fp32", (0.5, 40, 0.5)),
    ):
        compiled(draw._draw, {"logits": dtype, **keys}, TEMPERATURE=temperature, TOP_K=top_k, TOP_P=top_p, **same)
    kinds = {
        (*kind, number) for kind, number in zip(divergence._KINDS.values(), (0.0, 0.0, 0.1, 0.1, 0.5, 0.0), strict=True)
    }
    for sums, (kind, reverse, number) in itertools.product((tl.float32, tl.float64), sorted(kinds)):
        numbers = {"KIND": kind, "REVERSE": reverse, "NUMBER": number, "SUMS": sums, "BLOCK": 2048}
        types = dict.fromkeys(("p_logits", "q_logits", "out", "sums", "outer", "grad"), f"*{sums}")
        compiled(divergence._forward, types, GRAD=True, **numbers)
        compiled(divergence._backward, types, **numbers)
    for entropy in (True, False):
        types = {"logits": "*bf16", "labels": "*i64", "out": "*fp32"}
        compiled(divergence._single, types, ENTROPY=entropy, SUMS=tl.float32, BLOCK=4096)
