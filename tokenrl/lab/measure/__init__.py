"""Signal and noise of gradients measured on a real model."""
