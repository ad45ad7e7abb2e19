"""Commands that look and change nothing: verify, plan, doctor, status."""
