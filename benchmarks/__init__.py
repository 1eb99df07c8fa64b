"""Benchmarks: each prints a Markdown table and writes it to benchmarks/results/."""
