"""Benchmarks that tell the truth: the product's own steps against the machine's limits and a textbook implementation."""
