"""Checks of a config, this machine, the models and the cluster, each failure with its remedy."""
