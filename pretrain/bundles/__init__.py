"""Bundles: a finished model as a folder, to tune, to continue from, and to exchange with BART."""
