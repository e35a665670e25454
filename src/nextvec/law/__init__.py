"""A first N-D-K law: finished rows of a sweep over width, tokens and K, a fit with its uncertainty, and what it recommends."""
