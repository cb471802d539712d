"""Values that no key accepts: one line with the key and the value, exit code 2, nothing started or left behind."""

from __future__ import annotations

import pytest
from bad_input import check_refusal
from runs import config_file

STAGE = {"name": "train", "steps": 1}


@pytest.mark.bad_input("values: infinite or not a number")
@pytest.mark.parametrize("key", ["learner.lr", "student.temperature"])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_is_finite(place, monkeypatch, capfd, key, value):
    """No number is infinite or NaN."""
    config_file(place, [STAGE])
    check_refusal(monkeypatch, capfd, rf"{key}.*(inf|nan)", "train", "config.yaml", f"{key}={value}")
