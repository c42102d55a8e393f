"""Floor 3: what adds to a model and can be taken off again."""
