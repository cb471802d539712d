"""Memory and bytes of a run before it starts."""
