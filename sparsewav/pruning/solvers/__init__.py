"""Solvers: which weights of a matrix are removed, and what the kept ones become, given the matrix's Hessian."""
