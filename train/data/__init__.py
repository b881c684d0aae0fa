"""Training data: clips drawn on the fly, encoded sets."""
