"""The states of a batch between two decoder layers, when some of them have left."""
