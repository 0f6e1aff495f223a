"""The five kinds of methods, one engine each."""
