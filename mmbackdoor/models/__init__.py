"""Loading, encoding and naming of the parts of models.

The only place that knows diffusers, open_clip and transformers.
"""
