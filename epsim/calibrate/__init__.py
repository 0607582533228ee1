"""Calibration: parameters of a cluster fitted to measured TTFT and TPOT, and how far the fit can be believed."""
