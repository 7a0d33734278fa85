"""What a trained prior is used for."""
