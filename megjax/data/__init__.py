"""Data sets: procedural captioned scenes and latent caches."""
