"""Projection onto the vocabulary, cross-entropy and symmetric KL in one operator."""
