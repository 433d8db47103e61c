"""Compares arms, such as baselines, over seeds: plan, runs, statistics and report."""
