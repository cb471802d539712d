"""Ray, and only here: each room of the house as an actor, and the launch that places them on a cluster."""

import os

# Read once, when Ray is imported. Else whoever asks a Ray that was shut down (a timer that tries again, a thread that
# looks after actors) starts a new one behind everybody's back; it dies with that thread, and a minute later Ray ends
# this process with it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
