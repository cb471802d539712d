"""The algorithms, as pure tensor functions of plain numbers: draws, divergences, switching rules, losses.

Nothing here uses a config, a model, a process or a file; torch and numpy are the only imports.
Notation: p = teacher, q = student, N rows (positions), V vocabulary, t = index of a completion token.
"""
