"""Environments whose exact values are known: GridWorld, the walk, the bandit."""
