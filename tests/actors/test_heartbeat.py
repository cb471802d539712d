"""Where an actor's work is, as its heartbeat says it. (No cluster: the actors' classes, in threads of this process.)"""

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
    """The class behind Ray's wrapping, around a replay with these methods."""
    made = object.__new__(ReplayActor.__ray_metadata__.modified_class)
    made.replay, made.restored = SimpleNamespace(num_put=3, **methods), True
    return made


def test_says_what_it_waits_for():
    """Without a call: nothing. Within one: the line, and what it waits for; the outer reason again after an inner."""
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
        _, told, stacks = here.heartbeat()
        assert re.fullmatch(where, told), told
        assert "in take" in stacks and "in heartbeat" not in stacks
        assert actor().heartbeat()[1] == "", "another actor's call is not its own"
        go_on.set()
    thread.join()
    assert here.heartbeat()[1] == ""


def test_a_replay_that_was_started_again():
    """It knows nothing until `restore`: every call raises StateLost, and nothing can be rewound."""
    here = actor(restore=lambda path, num: [], stats=dict, rewind=lambda step, num: True)
    here.restored = False
    with pytest.raises(StateLost, match="the replay died"):
        here.call("stats")
    assert here.call("rewind", 0, 0) is False
    with pytest.raises(StateLost):
        here.call("stats")
    assert here.call("restore", None, 0) == []
    assert here.call("stats") == {} and here.call("rewind", 0, 0) is True
