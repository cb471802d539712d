"""Prompts in, rollouts waiting: data sets, the replay, rollout files."""
