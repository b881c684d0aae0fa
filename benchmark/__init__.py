"""Measurement of speed and memory: `context-forcing bench`."""
