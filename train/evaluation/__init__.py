"""Measuring students: recall over gaps, drift, consistency."""
