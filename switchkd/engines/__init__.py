"""Models behind two Protocols (base.py): what reads and what trains."""
