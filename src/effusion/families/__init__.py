"""Floor 4: one record per family, binding networks to blocks."""
