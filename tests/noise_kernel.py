"""A Triton kernel that stores what `algo.kernels.draw` computes and does not return: the noise and the scores."""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from switchkd.algo.kernels.draw import philox, score


def noise_and_scores(logits: Tensor, seed: int, ids: Tensor, positions: Tensor, purpose: int, temperature: float):
    """The bits, uint64 [R, V] on the host, and the scores, float64 [R, V], of logits [R, V]."""
    num, vocab = logits.shape
    bits = torch.empty(num, vocab, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num, vocab, dtype=torch.float64, device=logits.device)
    seeds = torch.from_numpy(np.array([seed & (2**64 - 1)], np.uint64).view(np.int64)).to(logits.device)
    block = max(triton.next_power_of_2(vocab), 16)
    _store[(num,)](logits, seeds, ids, positions, bits, scores, vocab, PURPOSE=purpose, TEMPERATURE=temperature,
                   BLOCK=block, enable_fp_fusion=False)  # fmt: skip
    return bits.cpu().numpy().view(np.uint64), scores.cpu()


@triton.jit
def _store(logits, seeds, rollout_ids, positions, out_bits, out_scores, vocab, PURPOSE: tl.constexpr,
           TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    exists = ids < vocab
    seed = tl.load(seeds).to(tl.uint64)
    bits = philox(0, seed, tl.load(rollout_ids + n), tl.load(positions + n), PURPOSE, BLOCK)
    values = tl.load(logits + n * vocab + ids, mask=exists, other=0.0)
    tl.store(out_bits + n * vocab + ids, bits.to(tl.int64, bitcast=True), mask=exists)
    tl.store(out_scores + n * vocab + ids, score(values, bits, TEMPERATURE), mask=exists)
