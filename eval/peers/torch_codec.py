"""Training of the seed codec in PyTorch, as a careful user writes it: whole batches, fused AdamW, no waiting."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megjax.codec.fitting import Conditions
from megjax.codec.network import EPSILON, LOG_SNR_SCALE, SeedCodecConfig, Trunk
from megjax.configs import require
from megjax.training import FitConfig

NAME = "PyTorch"
NUM_PATHS = 32
"""Plane waves of a realisation of Jakes fading, as in `megjax.channel.JakesFading`."""


class TorchBlock(nn.Module):
    """`megjax.codec.network.Block` of a latent that is one tile."""

    def __init__(self, config: SeedCodecConfig):
        super().__init__()
        self.modulation = _zeros(nn.Linear(Trunk.CONDITION, 3 * config.width))
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, -1)
        y = torch.addcmul(shift, 1 + scale, functional.layer_norm(x, x.shape[-1:], eps=EPSILON))
        return torch.addcmul(x, 1 + gate, self.down(functional.gelu(self.up(y), approximate="tanh")))


class TorchTrunk(nn.Module):
    """`megjax.codec.network.Trunk`: [b i], conditions [b 2] -> [b n]."""

    def __init__(self, config: SeedCodecConfig, inputs: int, blocks: int):
        super().__init__()
        self.condition_in = nn.Linear(2, Trunk.CONDITION)
        self.condition_out = nn.Linear(Trunk.CONDITION, Trunk.CONDITION)
        self.inputs = nn.Linear(inputs, config.width)
        self.blocks = nn.ModuleList([TorchBlock(config) for _ in range(blocks)])
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.gate = _zeros(nn.Linear(Trunk.CONDITION, config.width))
        self.outputs = _zeros(nn.Linear(config.width, config.tile_values))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        condition = functional.silu(self.condition_out(torch.tanh(self.condition_in(condition))))
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.outputs((1 + self.gate(condition)) * self.norm(x))


class TorchNetwork(nn.Module):
    """`megjax.codec.network.SeedNetwork` of a latent that is one tile, with what training needs of it."""

    def __init__(self, config: SeedCodecConfig):
        super().__init__()
        supported = config.num_tiles == 1 and config.transform == "klt" and config.encoder_blocks > 0
        require(supported, "codec", config, "one tile, transform 'klt', and an encoder")
        n, grid = config.num_values, (config.snr_steps, config.rate_steps)
        self.config = config
        self.register_buffer("latent_mean", torch.zeros(n))
        self.register_buffer("scale", torch.ones(n))
        self.register_buffer("basis", torch.eye(n))
        self.register_buffer("encoder_scale", torch.ones(grid))
        self.load_logits = nn.Parameter(torch.zeros(*grid, n))
        self.encoder = TorchTrunk(config, n, config.encoder_blocks)
        self.decoder = TorchTrunk(config, 2 * n, config.decoder_blocks)

    def position(self, snr_db: Tensor, num_symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Real-valued place on the grid of SNRs and of rates."""
        config = self.config
        step_db = (config.max_snr_db - config.min_snr_db) / (config.snr_steps - 1)
        along_snr = (snr_db - config.min_snr_db) / step_db
        log2_rate = torch.log2(config.num_values / (2.0 * num_symbols))
        along_rate = log2_rate * ((config.rate_steps - 1) / config.max_log2_rate)
        return along_snr.clamp(0, config.snr_steps - 1), along_rate.clamp(0, config.rate_steps - 1)

    def features(self, row: Tensor, column: Tensor) -> Tensor:
        sizes = self.config.snr_steps - 1, self.config.rate_steps - 1
        return torch.stack([4.0 * row / sizes[0] - 2.0, 4.0 * column / sizes[1] - 2.0], -1)

    def spend(self, snr_db: Tensor, num_symbols: Tensor) -> Tensor:
        """Power [g n] that the codec wants for each value: the table interpolated, as one matrix product."""
        along_snr, along_rate = (
            functional.relu(1 - (x[:, None] - torch.arange(size, device=x.device)).abs())
            for x, size in zip(self.position(snr_db, num_symbols), self.load_logits.shape[:2], strict=True)
        )
        weights = (along_snr[:, :, None] * along_rate[:, None]).flatten(1)
        return torch.exp(weights @ self.load_logits.flatten(0, 1))

    def analyse(self, latents: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Values [b n] of latents [b h w c] at grid points [b], before they are standardised."""
        x = (latents.flatten(1) - self.latent_mean) @ self.basis / self.scale
        return torch.addcmul(x, self.encoder_scale[row, column][:, None], self.encoder(x, self.features(row, column)))

    def decode(self, estimate: Tensor, snr: Tensor, features: Tensor) -> Tensor:
        """Latents [b h w c] from values [b n] in their own units, zero where none came, and the SNR of each."""
        inputs = torch.cat([estimate, torch.log1p(snr) / LOG_SNR_SCALE], -1)
        coefficients = torch.addcmul(estimate, torch.rsqrt(1 + snr), self.decoder(inputs, features))
        flat = torch.addmm(self.latent_mean, coefficients * self.scale, self.basis.T)
        return flat.unflatten(1, self.config.latent_shape)


class Draw(NamedTuple):
    """Random numbers of one training step of the codec, for g groups of b latents, as `draw` makes them."""

    index: Tensor
    """Rows [g b] of the latents."""
    snr_db: Tensor
    """Effective SNR [g]."""
    num_symbols: Tensor
    """K [g]."""
    interleaved: Tensor
    """Mapping [g]."""
    gains: Tensor
    """|h|^2 [g b t]."""
    loaded: Tensor
    """Whether block powers follow the codec's load [g b 1]."""
    factors: Tensor
    """What multiplies them [g b t]."""
    noise: Tensor
    """N(0, 1) [g b n]."""


def draw(conditions: Conditions, num_latents: int, num_values: int, device: torch.device) -> Draw:
    """The random numbers of a step, with the laws of `draw_conditions`, `draw_gains` and `draw_power`."""
    groups, size, blocks = conditions.groups, conditions.group_size, conditions.num_blocks
    rates = torch.tensor(conditions.rates, device=device)
    uniform = torch.rand(5, groups, device=device)
    exact = rates[torch.randint(len(conditions.rates), (groups,), device=device)]
    low, high = math.log2(min(conditions.rates)), math.log2(max(conditions.rates))
    rate = torch.where(uniform[0] < 0.7, exact, torch.exp2(low + (high - low) * uniform[1]))
    num_symbols = torch.round(num_values / (2 * rate)).clamp_min(blocks)
    snr_db = conditions.min_snr_db + (conditions.max_snr_db - conditions.min_snr_db) * uniform[2]
    if conditions.equal_energy:
        snr_db = snr_db + torch.where(uniform[3] < 0.5, 10 * torch.log10(num_values / (2 * num_symbols)), 0.0)
    kind = torch.rand(3, groups, size, 1, device=device)
    factors = torch.exp(1.5 * kind[2] * torch.randn(groups, size, blocks, device=device))
    return Draw(
        torch.randint(num_latents, (groups, size), device=device),
        snr_db,
        num_symbols.long(),
        uniform[4] < 0.5,
        draw_gains(groups * size, blocks, device).unflatten(0, (groups, size)),
        kind[0] < 0.65,
        torch.where(kind[1] < 0.3, factors, 1.0),
        torch.randn(groups, size, num_values, device=device),
    )


def draw_gains(batch: int, num_blocks: int, device: torch.device) -> Tensor:
    """|h_t|^2 [b t]: Rayleigh (half of them), Rician, Jakes or no fading, with random parameters.

    Rayleigh fading and none are Rician fading without a line of sight and with nothing else, so one draw serves three.
    """
    uniform = torch.rand(3, batch, 1, device=device)
    k_factor = 10 ** (1.2 * uniform[1])
    rician = (uniform[0] >= 0.5) & (uniform[0] < 0.65)
    jakes = (uniform[0] >= 0.65) & (uniform[0] < 0.8)
    none = uniform[0] >= 0.8
    scattered = torch.where(rician, 1 / (1 + k_factor), torch.where(none, 0.0, 1.0))
    parts = torch.sqrt(0.5 * scattered) * torch.randn(2, batch, num_blocks, device=device)
    gains = (torch.sqrt(1 - scattered) + parts[0]).square() + parts[1].square()
    doppler = 10 ** (2.5 * uniform[2] - 3)
    return torch.where(jakes, jakes_gains(doppler, num_blocks), gains)


def jakes_gains(doppler: Tensor, num_blocks: int) -> Tensor:
    """|h_t|^2 [b t] of Jakes fading at these Dopplers [b 1], by the algorithm of `megjax.channel.JakesFading`."""
    batch, device = len(doppler), doppler.device
    sectors = torch.arange(NUM_PATHS, device=device)
    angles = (math.pi / NUM_PATHS) * (sectors + torch.rand(batch, NUM_PATHS, device=device))
    turns = (2 * math.pi * doppler * torch.cos(angles))[:, None]
    stride = math.isqrt(num_blocks - 1) + 1
    coarse = turns * torch.arange(0, num_blocks, stride, device=device)[:, None]
    fine = turns * torch.arange(stride, device=device)[:, None]
    paths = math.sqrt(0.5 / NUM_PATHS) * torch.randn(2, batch, 1, NUM_PATHS, device=device)
    cosine, sine = torch.cos(coarse), torch.sin(coarse)
    real, imaginary = paths[0] * cosine - paths[1] * sine, paths[0] * sine + paths[1] * cosine
    # A complex matrix product as one of real matrices.
    left = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], 1)
    product = left @ torch.cat([torch.cos(fine), torch.sin(fine)], -1).mT
    return product.unflatten(1, (2, -1)).square().sum(1).flatten(1)[:, :num_blocks]


def block_members(num_values: int, num_symbols: Tensor, num_blocks: int, interleaved: Tensor) -> Tensor:
    """1 where a value travels in a block, else 0 [g n t]."""
    symbol, num_symbols = torch.arange(num_values, device=num_symbols.device) // 2, num_symbols[:, None]
    short, longer = num_symbols // num_blocks, num_symbols % num_blocks
    in_longer = longer * (short + 1)
    ordered = torch.where(symbol < in_longer, symbol // (short + 1), longer + (symbol - in_longer) // short)
    block = torch.where(interleaved[:, None], symbol % num_blocks, ordered.clamp_max(num_blocks - 1))
    return (block[:, :, None] == torch.arange(num_blocks, device=block.device)).float()


def loss_db(network: TorchNetwork, latents: Tensor, total_variance: float, drawn: Draw) -> Tensor:
    """Mean over groups of the group's NMSE in dB: `megjax.codec.fitting.codec_loss` for the random numbers `drawn`."""
    groups, size, num_blocks = drawn.gains.shape
    num_values = latents[0].numel()
    batch = latents[drawn.index.flatten()]
    place = network.position(drawn.snr_db, drawn.num_symbols)
    row, column = (torch.round(x).long().repeat_interleave(size, output_size=len(batch)) for x in place)
    values = network.analyse(batch, row, column).unflatten(0, (groups, size))
    variance, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    std = torch.sqrt(variance + 1e-6)

    spend = network.spend(drawn.snr_db, drawn.num_symbols)
    members = block_members(num_values, drawn.num_symbols, num_blocks, drawn.interleaved)
    sent = torch.arange(num_values, device=batch.device) < 2 * drawn.num_symbols[:, None]
    of_block = torch.stack([sent * spend, sent.float()], 1) @ members
    block_mean = of_block[:, :1].clamp_min(1e-30) / of_block[:, 1:]
    load = block_mean / block_mean.mean(-1, keepdim=True)
    shape = sent * spend / (block_mean @ members.mT)[:, 0]

    power = torch.where(drawn.loaded, load, 1.0) * drawn.factors
    block_snr = drawn.gains * power / power.mean(-1, keepdim=True)
    scale = (10 ** (drawn.snr_db / 10))[:, None, None]
    snr = block_snr @ (scale * (shape[:, :, None] * members).mT)  # no gather: its gradient would scatter
    received = (snr * (values - mean) / std + snr.clamp_min(1e-30).sqrt() * drawn.noise) / (1 + snr)

    estimate = torch.where(sent[:, None], torch.addcmul(mean, std, received), 0.0)
    features = network.features(*place).repeat_interleave(size, 0, output_size=len(batch))
    decoded = network.decode(estimate.flatten(0, 1), snr.flatten(0, 1), features)
    error = (decoded - batch).square().flatten(1).sum(1).unflatten(0, (groups, size)).mean(1)
    return 10 * torch.log10(error / total_variance).mean()


class Loop:
    """The loop of `megjax.training` over `parameters`: clipping, AdamW, its schedule, and the parameter average."""

    def __init__(self, parameters: list[nn.Parameter], config: FitConfig, loss: Callable[[], Tensor]):
        self.parameters, self.config, self.loss, self.steps = parameters, config, loss, 0
        self.ema = [p.detach().clone() for p in parameters]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_rate)

    def _share_of_rate(self, step: int) -> float:
        warmup, total = max(self.config.warmup_steps, 1), max(self.config.num_steps, 2)
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    def step(self) -> tuple[Tensor, Tensor]:
        """One step; its loss and the gradients' norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm, foreach=True)
        self.optimizer.step()
        self.schedule.step()
        decay = min(self.config.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        self.steps += 1
        return loss.detach(), norm

    def run(self, num_steps: int) -> tuple[float, float]:
        """Mean loss and norm of the next steps; reading them at the end waits for the device."""
        total = torch.zeros(2, device=self.parameters[0].device)
        for _ in range(num_steps):
            total += torch.stack(self.step())
        return tuple((total / num_steps).tolist())


def training(
    config: SeedCodecConfig,
    conditions: Conditions,
    fit: FitConfig,
    latents: Tensor,
    compiled: bool = False,
    mode: str | None = None,
) -> Loop:
    """The training of a new network on `latents` [n h w c], on their device; `compiled`, with `mode` if any, or eager.

    What is compiled is all of the loss, its draws and its gradient; AdamW and the average are each one fused call.
    """
    plain = conditions.snr_db is None and conditions.num_symbols is None and conditions.image_weight == 0
    require(plain, "conditions", conditions, "random ones without a loss on images")
    network = TorchNetwork(config).to(latents.device)
    total_variance = float(latents.flatten(1).double().var(0, correction=0).sum())

    def loss() -> Tensor:
        drawn = draw(conditions, len(latents), config.num_values, latents.device)
        return loss_db(network, latents, total_variance, drawn)

    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False, mode=mode)
    return Loop(list(network.parameters()), fit, loss)


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
