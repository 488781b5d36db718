"""The linear operators: exact GGN, K-FAC, EK-FAC, and their inverses and powers."""
