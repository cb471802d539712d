"""Who does what when: schedule, dispatch, recovery, checkpoints, evaluation, metrics."""
