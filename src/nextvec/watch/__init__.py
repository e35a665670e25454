"""`nextvec watch`: what a run directory says of its training, while that goes on and afterwards."""
