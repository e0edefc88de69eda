"""Solvers: which weights of a matrix go, and what the others become, given its Hessian."""
