"""Rollouts become a gradient: batches, the loss module, DeepSpeed."""
