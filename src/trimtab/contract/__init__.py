"""The executable contract: what every method promises, as small functions that prove it on small models."""
