"""What spends Hessian-vector products: Lanczos, quadrature, eigenpairs, traces, shares."""
