"""EDM (Karras et al. 2022): preconditioning, loss, samplers."""
