"""The whole training step as one graph: forward, backward, check, clipping, update."""
