"""Quantized layers, and the conversion of a model to them."""
