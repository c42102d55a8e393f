"""Floor 1: safetensors, torch files, gguf; hub and folders; key maps; saving."""
