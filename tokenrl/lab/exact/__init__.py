"""Gradients summed over everything that can happen: bias proven, variance exact."""
