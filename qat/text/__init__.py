"""Text to train and to validate on."""
