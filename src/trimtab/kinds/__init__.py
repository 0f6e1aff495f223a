"""The five kinds of methods, one engine each."""

ENGINES = frozenset({"weight", "selection", "activation", "tokens", "prompt", "stack"})
"""The modules here that are engines; the others hold what several methods of one engine share."""
