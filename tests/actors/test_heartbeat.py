"""The heartbeat reports where an actor's call is. (No cluster: the actors' classes, in threads of this process.)"""

from __future__ import annotations

import re
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from switchkd.actors.heartbeat import waiting_for
from switchkd.actors.replay_actor import ReplayActor
from switchkd.types import StateLost


def actor(**methods: Any) -> Any:
    """An instance of the class that Ray wraps, around a replay with these methods."""
    made = object.__new__(ReplayActor.__ray_metadata__.modified_class)
    made.replay, made.restored = SimpleNamespace(num_put=3, **methods), True
    return made


def test_a_heartbeat_names_the_line_and_the_wait():
    """The heartbeat names the current line and the innermost `waiting_for`; without a call it is empty."""
    inner, outer, plain, end = (Event() for _ in range(4))
    steps = [Event() for _ in range(3)]

    def take() -> None:
        with waiting_for("a teacher"):
            with waiting_for("weights"):
                inner.set()
                steps[0].wait(30)
            outer.set()
            steps[1].wait(30)
        plain.set()
        end.wait(30)

    here = actor(take=take)
    assert here.heartbeat()[:2] == (3, "")
    thread = Thread(target=here.call, args=("take",))
    thread.start()
    place = r"actors/replay_actor.py:\d+, call"
    for reached, go_on, where in (
        (inner, steps[0], rf"waits for weights \({place}\)"),
        (outer, steps[1], rf"waits for a teacher \({place}\)"),
        (plain, end, rf"is at {place}"),
    ):
        assert reached.wait(30)
        _, location, stacks = here.heartbeat()
        assert re.fullmatch(where, location), location
        assert "in take" in stacks and "in heartbeat" not in stacks
        assert actor().heartbeat()[1] == "", "an actor reports its own call only"
        go_on.set()
    thread.join()
    assert here.heartbeat()[1] == ""


def test_a_restarted_replay_refuses_calls_until_restore():
    """Until `restore`, calls of a restarted replay raise StateLost and `rewind` returns False."""
    here = actor(restore=lambda path, num: [], stats=dict, rewind=lambda step, num: True)
    here.restored = False
    with pytest.raises(StateLost, match="the replay died"):
        here.call("stats")
    assert here.call("rewind", 0, 0) is False
    with pytest.raises(StateLost):
        here.call("stats")
    assert here.call("restore", None, 0) == []
    assert here.call("stats") == {} and here.call("rewind", 0, 0) is True
