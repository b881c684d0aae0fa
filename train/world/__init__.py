"""The demo world: a ring of landmarks under a panning camera. It is small enough to measure what a model remembers."""
