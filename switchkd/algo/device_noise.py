"""The random numbers of draws in plain torch operations, on any device: the same bits as `algo/noise.py`.

In: keys, int64 [N]. Out: bits [N, V] of a counter-based generator, and Gumbel numbers made of them.
"""

import torch
from torch import Tensor

from switchkd.algo.noise import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, UNIT, WORD, Purpose

_LOW = 0xFFFFFFFF
_PARTS = (lambda word: word, lambda word: word >> 32, lambda word: word & _LOW)  # the whole word and its halves


def noise_bits_torch(run_seed: int, rollout_ids: Tensor, positions: Tensor, purpose: Purpose, num: int) -> Tensor:
    """`noise_bits` of many keys on any device: int64 [N], int64 [N] -> int64 [N, num], the same 64 bits.

    Both products of a round are one operation on words (0, 2), stacked; words (3, 1) are stacked the other way round.
    """
    num_keys, num_blocks, device = len(rollout_ids), -(-num // 4), rollout_ids.device
    # numpy steps the counter before its first block
    block = torch.arange(1, num_blocks + 1, device=device)
    zero = block.new_zeros((num_keys, num_blocks))
    factors = torch.stack([zero + block, zero + positions.long()[:, None]])
    others = torch.stack([zero + _signed(purpose), zero])
    # no tensor comes from the host, so that the draw can be part of a CUDA graph
    step, word = torch.arange(PHILOX_ROUNDS, device=device)[:, None], torch.arange(2, device=device)[:, None, None]
    keys_0 = step * _signed(PHILOX_WEYL[0]) + _signed(run_seed)
    keys_2 = step * _signed(PHILOX_WEYL[1]) + rollout_ids.long()
    keys_20 = torch.stack([keys_2, keys_0.expand_as(keys_2)], dim=1)[..., None]  # [rounds, words (2, 0), N, 1]
    keys_02 = keys_20.flip(1)
    orders = []
    for first, second in (PHILOX_MULTIPLIERS, reversed(PHILOX_MULTIPLIERS)):  # of words (0, 2) and (2, 0)
        orders.append([word * _signed(part(second) - part(first)) + _signed(part(first)) for part in _PARTS])
    for i in range(PHILOX_ROUNDS):
        whole, high, low = orders[i % 2]
        key = keys_02[i] if i % 2 else keys_20[i]
        factors, others = _high_word(factors, high, low) ^ others ^ key, (factors * whole).flip(0)
    words = (factors[0], others[1], factors[1], others[0])
    return torch.stack(words, dim=-1).flatten(1)[:, :num]


def gumbel_torch(bits: Tensor) -> Tensor:
    """`gumbel` of an int64 bit pattern, float64, on its device."""
    uniform = ((bits >> 11) & (2**53 - 1)).double() * UNIT
    return -torch.log(-torch.log(uniform))


def _signed(word: int) -> int:
    """The int64 with the 64 low bits of `word`."""
    word &= WORD
    return word - 2**64 if word >= 2**63 else word


def _high_word(a: Tensor, b_high: Tensor, b_low: Tensor) -> Tensor:
    """The high 64 bits of the unsigned product, from 32-bit halves, since torch has no wider integer."""
    a_high, a_low = (a >> 32) & _LOW, a & _LOW
    middle = a_high * b_low + (((a_low * b_low) >> 32) & _LOW)
    cross = a_low * b_high + (middle & _LOW)
    return a_high * b_high + ((middle >> 32) & _LOW) + ((cross >> 32) & _LOW)
