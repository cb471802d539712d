"""Model folders: sources, loading, pruning, LM heads, sizes."""
