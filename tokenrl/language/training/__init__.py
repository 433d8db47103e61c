"""The training step, the loop around it, and what both need: critic, KL control, evaluation."""
