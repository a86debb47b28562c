"""Fast pieces, each with a plain reference beside it."""
