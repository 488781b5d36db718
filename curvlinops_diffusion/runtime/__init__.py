"""Passes over batches, resumable and shared among processes; files, digests, checks."""
