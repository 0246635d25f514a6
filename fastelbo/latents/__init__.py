"""The latents: what the encoder parametrizes, their prior, and what of their KL enters the objective."""
