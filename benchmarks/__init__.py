"""Measurements: one program a question, results as JSON in ``benchmarks/results``."""
