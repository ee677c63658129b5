"""The same pruner in somebody else's trainer."""
