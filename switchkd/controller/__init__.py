"""The loop's parts: schedule, dispatch, recovery, checkpoints, evaluation, metrics."""
