"""Keyed random numbers: every number of a run that is drawn is a function of (seed, index, position, purpose).

In: a key. Out: bits of a counter-based generator, and Gumbel numbers and coins made of them. NumPy only, so that a
process without models needs no torch; `algo/device_noise.py` makes the same bits on a device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum, unique

import numpy as np

WORD = 2**64 - 1
UNIT = 2.0**-53
PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # Philox4x64 (Salmon et al., SC 2011)
PHILOX_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
PHILOX_ROUNDS = 10
_MULTIPLIERS = tuple(np.uint64(word) for word in PHILOX_MULTIPLIERS)
_WEYL = tuple(np.uint64(word) for word in PHILOX_WEYL)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@unique
class Purpose(IntEnum):
    """The purpose of a random number. Each purpose has an independent noise stream, so no two uses share one."""

    GUMBEL = 0  # both models' coupled draws, by rollout id and position
    COIN = 1  # the coins of rules, by rollout id and position
    SKD = 2  # a replacement that must not depend on the drafted id, by rollout id and position
    EVAL = 3  # an evaluation's draws, by its seed, prompt index and position
    PROMPT_ORDER = 4  # the order of an epoch
    ROLLOUT_SOURCE = 5  # the source of a completion, by rollout id
    BATCH_SOURCE = 6  # the source of a step's completions (`mix.drawn: per_batch`)
    ADAPTIVE_SOURCE = 7  # whether a step generates or reuses (`replay.policy: adaptive`)
    REUSE = 8  # the rollouts that a step reuses
    LORA_INIT = 9  # seeds new adapters
    DROPOUT = 10  # seeds dropout, by rank


def noise_bits(seed: int, index: int, position: int, purpose: Purpose, num: int) -> np.ndarray:
    """The stream of one key, uint64 [num]; a shorter stream is a prefix of a longer one. A draw's key has the run's
    seed and the rollout id; token id = index in the stream.

    Philox4x64-10 keyed by (seed, index). Position and purpose are the high half of the 256-bit counter and the stream
    counts in the low half, so no two keys share a block. Negative numbers wrap to 64 bits.
    """
    key = np.array([seed & WORD, index & WORD], dtype=np.uint64)
    counter = np.array([0, 0, position & WORD, purpose & WORD], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num)


def noise_streams(keys: Iterable[tuple[int, int, int, int]]) -> Iterator[Callable[[int], np.ndarray]]:
    """For each key (seed, index, position, purpose) in turn, a function of `num` that returns its `noise_bits`. To make
    a generator costs more than a short stream, so one generator moves from key to key."""
    generator = np.random.Philox(key=0)
    state = generator.state
    for seed, index, position, purpose in keys:
        state["state"] = {
            "counter": np.array([0, 0, position & WORD, purpose & WORD], np.uint64),
            "key": np.array([seed & WORD, index & WORD], np.uint64),
        }
        generator.state = state
        yield generator.random_raw


def gumbel(bits: np.ndarray) -> np.ndarray:
    """Gumbel numbers, float64, of uint64 bits: -log(-log U), U = top 53 bits in [0, 1). U = 0 gives -inf."""
    with np.errstate(divide="ignore"):
        return -np.log(-np.log((bits >> np.uint64(11)) * UNIT))


def coin(
    seed: int,
    indices: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    purpose: Purpose = Purpose.COIN,
) -> np.ndarray:
    """One uniform number in [0, 1) with 53 random bits per (index, position), float64 [N]; by default the coins of
    rules, whose index is the rollout id."""
    return (first_words(seed, np.asarray(indices), np.asarray(positions), purpose) >> np.uint64(11)) * UNIT


def first_words(seed: int, indices: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """`noise_bits(..., num=1)` of N keys at once, uint64 [N]: Philox4x64-10 on arrays."""
    if len(indices) != len(positions):
        raise ValueError(f"{len(indices)} indices for {len(positions)} positions: pass one of each per key")
    with np.errstate(over="ignore"):  # words wrap
        zero = np.zeros(len(indices), np.uint64)
        words = [zero + np.uint64(1), zero, zero + positions.astype(np.uint64), zero + np.uint64(purpose & WORD)]
        key = [zero + np.uint64(seed & WORD), indices.astype(np.uint64)]
        for _ in range(PHILOX_ROUNDS):
            (high_0, low_0), (high_1, low_1) = (_multiply(words[2 * i], _MULTIPLIERS[i]) for i in range(2))
            words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
            key = [key[i] + _WEYL[i] for i in range(2)]
    return words[0]


def _multiply(a: np.ndarray, b: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of the product, from 32-bit halves."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a_high * b_low + ((a_low * b_low) >> _HALF)
    cross = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _HALF) + (cross >> _HALF), a * b
