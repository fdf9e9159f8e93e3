"""CLIPTextModel: the causal transformer that turns token ids into text features (Radford et al. 2021), in Flax NNX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from megjax.configs import from_mapping, require, require_positive_integers
from megjax.diffusion.attention import attend
from megjax.diffusion.layers import layer_norm, linear

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# Settings that transformers writes into every config.json and that do not touch the hidden states of inference.
IGNORED = frozenset(
    {
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "initializer_factor",
        "initializer_range",
        "projection_dim",
        "attention_dropout",
        "dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "use_bfloat16",
        "pruned_heads",
        "chunk_size_feed_forward",
        "finetuning_task",
        "prefix",
        "tf_legacy_loss",
        "tie_word_embeddings",
        "tie_encoder_decoder",
        "is_decoder",
        "task_specific_params",
        "tokenizer_class",
        "use_cache",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "attn_implementation",
    }
)
ONLY = {"is_encoder_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIPTextModel; the names and defaults are those of its config.json."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        require_positive_integers(self, "text", (*names, "max_position_embeddings"))
        require(self.hidden_act in ACTIVATIONS, "text: hidden_act", self.hidden_act, f"one of {sorted(ACTIVATIONS)}")
        heads = self.num_attention_heads
        require(
            heads >= 1 and self.hidden_size % heads == 0,
            "text: num_attention_heads",
            heads,
            f"a divisor of {self.hidden_size}",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], dtype=jnp.float32) -> "CLIPTextConfig":
        """Read a transformers config.json; ValueError names any setting that is not supported."""
        kind = values.get("model_type", "clip_text_model")
        require(kind == "clip_text_model", "text config: model_type", kind, "'clip_text_model'")
        config = from_mapping(cls, values, only=ONLY, ignored=IGNORED, source="text config")
        return dataclasses.replace(config, dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' CLIPTextModel reads."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "dtype"}
        values |= {"bos_token_id": self.vocab_size - 2, "eos_token_id": self.vocab_size - 1}
        values |= {"pad_token_id": self.vocab_size - 1, "projection_dim": self.hidden_size}
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **values}


class Embeddings(nnx.Module):
    """Token plus learned position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, embedding_init=init, rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, dtype=config.dtype, embedding_init=init, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class SelfAttention(nnx.Module):
    """Causal multi-head self-attention with biased projections."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.k_proj = linear(width, width, config.dtype, rngs)
        self.v_proj = linear(width, width, config.dtype, rngs)
        self.q_proj = linear(width, width, config.dtype, rngs)
        self.out_proj = linear(width, width, config.dtype, rngs)
        self.num_heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        causal = jnp.asarray(np.tri(x.shape[1], dtype=bool))
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, mask=causal))


class MLP(nnx.Module):
    """Two dense layers with the checkpoint's activation."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.fc1 = linear(config.hidden_size, config.intermediate_size, config.dtype, rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, config.dtype, rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-normalised attention and MLP, each with a residual."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, config.dtype, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, config.dtype, rngs)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "b l d"], skip: int) -> Float[Array, "b l d"]:
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


class CLIPTextModel(nnx.Module):
    """Token ids to text features.

    Checkpoints that want the penultimate layer (Stable Diffusion 2) say so by a smaller `num_hidden_layers`.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, config.dtype, rngs)
        self.config = config

    def __call__(self, ids: Int[Array, "b l"], clip_skip: int = 0) -> Float[Array, "b l d"]:
        """Features of the last layer but `clip_skip`, normalised.

        Raises ValueError if `ids` are longer than the position table or `clip_skip` leaves no layer.
        """
        limit = self.config.max_position_embeddings
        require(ids.shape[1] <= limit, "length of ids", ids.shape[1], f"at most {limit}")
        layers = self.config.num_hidden_layers
        require(0 <= clip_skip < layers, "clip_skip", clip_skip, f"in [0, {layers})")
        return self.final_layer_norm(self.encoder(self.embeddings(ids), clip_skip))
