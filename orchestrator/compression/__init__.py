"""Calibration and compression: from a plan to committed payloads."""
