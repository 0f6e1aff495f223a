"""Arithmetic with trained adapters: their changes added, subtracted, averaged and compressed."""
