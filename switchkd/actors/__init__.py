"""Ray, and only here: each room of the house as an actor, and the launch that places them on a cluster."""
