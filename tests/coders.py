"""Sending latents by a coder, for tests of coders."""

from megjax.system import AnalogLink, send_latents


def simulate(coder, keys, latents, snr_db, fading, *, num_symbols, num_blocks=16, mapping="ordered", power="codec"):
    """Received latents and SNRs of the blocks, one realisation of the link for each latent."""
    link = AnalogLink(num_symbols, num_blocks, mapping)
    return send_latents(link, coder, keys, latents, snr_db, fading, power)
