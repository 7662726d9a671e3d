"""Algorithms that multiply vectors by an operator: Lanczos, quadrature, eigenpairs, traces, shares of eigenvalues."""
