"""What is computed, as pure tensor functions of plain numbers: draws, divergences, switching rules, losses.

Nothing here knows of a config, a model, a process or a file; torch and numpy are the only imports.
Notation everywhere: p = teacher, q = student, N rows (positions), V vocabulary, t = index of a response token.
"""
