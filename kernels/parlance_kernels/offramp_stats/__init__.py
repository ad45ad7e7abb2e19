"""What an early exit asks of the logits at a layer."""
