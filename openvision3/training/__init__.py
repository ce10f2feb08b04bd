"""Training of the unified encoder: `loop.train` is the place to start reading."""
