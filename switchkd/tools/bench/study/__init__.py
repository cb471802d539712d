"""Which method teaches better: a grid of runs, their scores, a table and a plot."""
