"""Networks: the diffusion transformer, its hint control, and the autoencoder."""
