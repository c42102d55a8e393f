"""Floor 2: the memory engine: plan, forecast, engine, policies, report."""
