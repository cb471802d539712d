"""Names the replacements of keys and values of format 1 configs. None of these is accepted any more.

In: a dotted key and its value. Out: one sentence that names the new key and value, or nothing.
"""

from __future__ import annotations

from typing import Any

KEYS = {
    "teacher.signal": "teacher.output",
    "teacher.signal_top_k": "teacher.num_top_logprobs",
    "student.cut": "student.prune",
    "data.max_broken_frac": "data.max_quarantined_frac",
    "rollout.lead": "rollout.drafter",
    "rollout.block_size": "rollout.max_draft_tokens",
    "rollout.save_signal": "rollout.save_teacher_output",
    "rollout.save_candidates": "rollout.save_top_logprobs",
    "replay.phi": "replay.adaptive",
}

VALUES = {
    "teacher.output": {"hidden": "hidden_states", "full": "logits", "topk": "top_logprobs"},
    "rollout.drafter": {"lockstep": "none"},
    "replay.policy": {"completion": "first_finished"},
}
"""By the new key: old value, new value."""

REMOVED = {
    "teacher.decide": "remove it: with teacher.output=top_logprobs every rollout is approximate",
    "teacher.interface": "remove it: vLLM teachers always send through the worker extension",
    "replay.policy=uniform": "take replay.policy=adaptive with replay.adaptive={start: 1, step: 0}",
}
"""Keys, or keys with a value, and their remedies."""


def replacement(key: str, value: Any) -> str | None:
    """Return the error text for `key` with `value`; None where neither is in the tables."""
    name = key
    if key.startswith("teachers.") and key.count(".") > 1:  # teachers.NAME.output
        name = f"teacher.{key.split('.', 2)[2]}"
    for removed in (name, f"{name}={value}"):
        if removed in REMOVED:
            return f"{key}={value!r} is gone; {REMOVED[removed]}"
    new_name = KEYS.get(name, name)
    new_value = VALUES.get(new_name, {}).get(value, value) if isinstance(value, str) else value
    if (new_name, new_value) == (name, value):
        return None
    new_key = key.removesuffix(name.partition(".")[2]) + new_name.partition(".")[2]
    if new_value == value:
        return f"{key} (value {value!r}) is now {new_key}; rename the key"
    return f"{key}={value!r} is now {new_key}={new_value}; write that instead"
