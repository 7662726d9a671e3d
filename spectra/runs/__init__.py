"""A spectrum along a training, on disk."""
