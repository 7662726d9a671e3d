"""Quantization-aware training: the baseline and WinQ."""
