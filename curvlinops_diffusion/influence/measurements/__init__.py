"""Measurements of a query, one kind a file."""
