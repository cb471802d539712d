"""Model folders: where they come from, how they load, their LM heads, their sizes."""
