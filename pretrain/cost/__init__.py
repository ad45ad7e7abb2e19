"""What training takes: operations, memory, and the most a device can do."""
