"""Latent diffusion in JAX: text encoder, U-Net, autoencoder, schedules, samplers and the pipeline."""
