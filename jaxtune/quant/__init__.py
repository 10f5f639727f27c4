"""Weights in fewer bits: quantised as a model is loaded, or read from a checkpoint that is quantised already."""
