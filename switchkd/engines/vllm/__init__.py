"""The teacher as a vLLM engine that returns hidden states."""
