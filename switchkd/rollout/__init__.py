"""Prompts become rollouts: draft, verify, accept."""
