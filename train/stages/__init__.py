"""Training stages, and what they share."""
