"""What serving and training must agree on: the steering formula, adapter LMs and the light contract types."""
