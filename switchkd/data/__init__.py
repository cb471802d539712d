"""Data sets and prompts, the replay, rollout files."""
