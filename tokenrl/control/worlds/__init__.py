"""Environments whose exact values are known: GridWorld, the walk and the bandit."""
