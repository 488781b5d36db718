"""Inverses by iteration or by formula, one a file."""
