"""Comparison of methods: a grid of runs, their scores, a table and a plot."""
