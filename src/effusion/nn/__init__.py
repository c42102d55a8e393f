"""Floor 1: attention and its backends, norms, embeddings, residual and transformer blocks."""
