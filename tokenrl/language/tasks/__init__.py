"""Where prompts come from: toy tasks, data sets, reasoning-gym, objects."""
