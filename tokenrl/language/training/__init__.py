"""Trains a policy: the training step, the loop around it, with critic, KL control and evaluation."""
