"""switchkd: distil a large language model into a small one with the teacher stepping in during generation."""

__version__ = "0.1.0"
