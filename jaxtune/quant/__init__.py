"""Weights in few bits: the leaves that compute with them, and the files that hold them."""
