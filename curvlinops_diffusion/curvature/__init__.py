"""Curvature of diffusion models: the exact GGN, K-FAC, EK-FAC."""
