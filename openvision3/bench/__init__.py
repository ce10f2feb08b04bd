"""Measurements of speed and memory: `ov3 bench`."""
