"""Around a run: plan, doctor, report, bench, export, evaluation without a run."""
