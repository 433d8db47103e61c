"""Loads tasks (prompts with a reward) from toy tasks, datasets, reasoning-gym, or a user's own objects."""
