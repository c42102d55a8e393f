"""Floor 5: losses, EMA, recipes."""
