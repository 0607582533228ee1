"""Predictions beside published measurements: what is reproduced, what is fitted, and what cannot be known."""
