"""Training of the bundled latent diffusion model: tokenizer, VAE, U-Net with text encoder, and SceneNet."""
