"""Floor 6: the demo model, its data, training and score."""
