"""Teacher and student as transformers models with a KV cache of slots."""
