"""Gradients of single examples, and the scores made of them."""
