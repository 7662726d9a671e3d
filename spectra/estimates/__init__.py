"""From Lanczos matrices to numbers with intervals. NumPy and SciPy alone."""
