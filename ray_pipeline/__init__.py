"""Diffusion priors for microscopy images, trained on Ray."""

__version__ = "0.1.0"
