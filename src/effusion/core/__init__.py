"""Floor 0: the types that flow, errors, configuration, registry, random numbers, logging."""
