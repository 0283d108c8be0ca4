"""Differentiable training signals: pure functions from outputs to a dictionary with parts `*_loss` and their sum `loss`."""
