"""Measures how fast this package is: every figure as a ratio, ours beside a floor or a plain baseline, in one run."""
