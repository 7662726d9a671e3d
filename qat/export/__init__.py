"""Trained models for other programs: packed weights, torchao's tensors, GGUF; and loading quantized folders."""
