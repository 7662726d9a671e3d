"""Weight quantizers: one scheme a file, one interface."""
