"""Vectors of parameters, blocks, block-diagonal operators, storage."""
