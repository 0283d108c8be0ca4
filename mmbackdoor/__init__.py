"""mmbackdoor: poison (to make testbeds) and clean text-to-image diffusion models and CLIP models.

Importing this package imports nothing heavy; `mmbackdoor list` shows the methods.
"""

__version__ = "0.1.0"
