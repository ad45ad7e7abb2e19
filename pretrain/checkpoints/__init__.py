"""Checkpoints that a kill, a full disk or a flipped bit cannot take away."""
