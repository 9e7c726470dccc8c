"""How the weights in `registry/weights/` were made: seeded, one command each."""
