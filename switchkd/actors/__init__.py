"""Ray, and only here: the actors, their pools and placements, and the launch that starts them on a cluster."""

import os

# Read once, when Ray is imported. Else a call after ray.shutdown() (by a timer that retries, or by another thread)
# silently starts a new Ray; that one ends with the thread, and a minute later Ray ends this process with it.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
