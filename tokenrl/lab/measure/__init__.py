"""Measures signal, noise and direction of gradients on samples of a real model."""
