"""Computes exact expectations and variances of gradients, by summing over everything that can happen."""
