"""Attention over packed rows, under a SampleMask."""
