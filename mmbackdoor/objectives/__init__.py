"""Differentiable training signals: pure functions from outputs to a dictionary of parts `*_loss` and their sum `loss`."""
