"""`jaxtune doctor`: whether this machine and a configuration are fit to train, asked before hours are spent on it."""
