"""Channel rollouts in Sionna 2 (PyTorch), on its own classes; importing this needs `sionna` or `sionna-no-rt`."""

from collections.abc import Callable

import numpy as np
import torch
from sionna.phy import config
from sionna.phy.channel import AWGN, RayleighBlockFading
from sionna.phy.channel.tr38901 import TDL

NAME = "Sionna"
CARRIER_HZ = 3.5e9
LIGHT_M_S = 299_792_458.0


def block_fading(symbols: np.ndarray, noise_var: float) -> Callable[[], torch.Tensor]:
    """A call that sends `symbols` [b t k] over `RayleighBlockFading` and `AWGN`, one gain a block."""
    sent = torch.as_tensor(symbols, device=config.device)
    batch, num_blocks, _ = sent.shape
    fading, awgn = RayleighBlockFading(1, 1, 1, 1), AWGN()

    def call() -> torch.Tensor:
        gains, _ = fading(batch * num_blocks, 1)
        return _wait(awgn(gains.reshape(batch, num_blocks, 1) * sent, noise_var))

    return call


def tdl(
    batch: int, num_steps: int, doppler_hz: float, interval_s: float, profile: str, delay_spread_s: float, paths: int
) -> Callable[[], torch.Tensor]:
    """A call that draws taps of `TDL`, [b ... l t], with this maximum Doppler shift."""
    speed = doppler_hz * LIGHT_M_S / CARRIER_HZ
    model = TDL(profile, delay_spread_s, CARRIER_HZ, num_sinusoids=paths, min_speed=speed, max_speed=speed)
    return lambda: _wait(model(batch, num_steps, 1 / interval_s)[0])


def _wait(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor
