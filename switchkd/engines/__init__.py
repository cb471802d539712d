"""Models behind the protocols of base.py: sessions, weights, backends."""
