"""Differential privacy: mechanisms, and what is released under them."""
