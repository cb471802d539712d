"""Refuses secrets in a config: it is written into run folders, checkpoints and logs."""

from __future__ import annotations

import re
from typing import Any

from switchkd.config.errors import ConfigError

_SECRET = re.compile(
    r"(^|_)(api_?key|access_?key|(hf|hub|api|access|auth|bearer|wandb|comet)_?token|password|passwd|secret|credentials?)$"
    r"|^token$",  # not `stop_token` or `pad_token`
    re.IGNORECASE,
)
_VARIABLES = {"wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY", "token": "HF_TOKEN"}
"""The environment variable to use instead, by a part of the key."""


def check_no_secrets(raw: Any, key: str = "") -> None:
    """Raise ConfigError, without the value, for a text under a key such as `api_key` or `hf_token`, at any depth."""
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for name, value in items:
        path = f"{key}.{name}".lstrip(".")
        if isinstance(value, str) and value and _SECRET.search(str(name)):
            known = [variable for part, variable in _VARIABLES.items() if part in path.lower()]
            variable = known[0] if known else "that its library reads"
            raise ConfigError(
                f"{path} holds a secret, which the run's folder, checkpoints and logs would show; remove the key and "
                f"set the environment variable {variable}"
            )
        check_no_secrets(value, path)
