"""CLIPTextModel against PyTorch transformers with random weights, and its configuration."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion.clip import CLIPTextConfig, CLIPTextModel
from megjax.diffusion.layers import ShapeRngs
from tests.checks import assert_equal_trees

PARITY = 1e-4
# Published text_encoder/config.json of Stable Diffusion 1.5 and 2.1.
SD_15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD_21 = SD_15 | {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}
# What transformers 4.1x wrote besides into the config.json of every model.
LEGACY = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
IDS = np.random.default_rng(0).integers(0, 100, (2, 11)).astype(np.int32)


def hidden_states(port):
    import torch

    with torch.no_grad():
        return port.torch(torch.tensor(IDS), output_hidden_states=True)


def last_features(model, ids):
    return model(ids)


def all_features(model, ids):
    """With 0, 1 and 2 layers skipped."""
    return [model(ids, clip_skip=skip) for skip in range(3)]


def test_features_equal_transformers(tiny_text, error_of):
    """Of Stable Diffusion 1.5's kind of encoder, also with layers skipped."""
    import torch

    found, reference = tiny_text.run(all_features, IDS, checked=True), hidden_states(tiny_text)
    assert found[0].shape == (2, 11, 32) and found[0].dtype == jnp.float32
    assert error_of(found[0], reference.last_hidden_state) <= PARITY
    for skip in (1, 2):
        with torch.no_grad():
            skipped = tiny_text.torch.final_layer_norm(reference.hidden_states[-(skip + 1)])
        assert error_of(found[skip], skipped) <= PARITY
        assert error_of(found[0], skipped) > 10 * PARITY


def test_features_of_other_settings_equal_transformers(make_text, error_of):
    """Stable Diffusion 2.1's kind of encoder."""
    port = make_text(hidden_act="gelu", num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-3)
    reference = hidden_states(port).last_hidden_state
    assert error_of(port.run(last_features, IDS), reference) <= PARITY
    for change in ({"hidden_act": "quick_gelu"}, {"num_attention_heads": 4}):
        assert error_of(port.replace(**change).run(last_features, IDS), reference) > 10 * PARITY


def test_features_are_causal(tiny_text):
    changed = IDS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 100
    one, two = (np.asarray(tiny_text.run(all_features, ids, checked=True)[0]) for ids in (IDS, changed))
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert (np.abs(one[:, 6:] - two[:, 6:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_every_age_load(tiny_text, tmp_path, prefix):
    import torch
    from safetensors.torch import save_file

    state = {name.removeprefix("text_model."): value for name, value in tiny_text.torch.state_dict().items()}
    tensors = {prefix + name: value.contiguous() for name, value in state.items()}
    save_file(tensors | {prefix + "embeddings.position_ids": torch.arange(16)[None]}, tmp_path / "model.safetensors")

    assert_equal_trees(tiny_text.load([tmp_path / "model.safetensors"]), tiny_text.params)


def test_bfloat16_is_close_to_float32(tiny_text, half_close):
    low = tiny_text.replace(dtype=jnp.bfloat16).run(last_features, IDS)
    assert low.dtype == jnp.bfloat16
    half_close(low.astype(jnp.float32), hidden_states(tiny_text).last_hidden_state, tiny_text.params)


def test_bad_calls_are_refused(tiny_text):
    model = nnx.merge(tiny_text.graph, tiny_text.params)
    with pytest.raises(ValueError, match="length of ids is 17; it must be at most 16"):
        model(jnp.zeros((1, 17), jnp.int32))
    for skip in (-1, 3):
        with pytest.raises(ValueError, match=f"clip_skip is {skip}"):
            model(jnp.zeros((1, 4), jnp.int32), clip_skip=skip)


def test_size_of_the_published_checkpoint():
    config = CLIPTextConfig.from_dict(SD_15)
    state = nnx.state(nnx.eval_shape(lambda: CLIPTextModel(config, rngs=ShapeRngs())))
    assert sum(value.size for _, value in nnx.to_flat_state(state)) == 123_060_480


@pytest.mark.parametrize("values", [SD_15, SD_21, SD_15 | LEGACY])
def test_published_configs_are_read_and_round_trip(values):
    import torch
    from transformers import CLIPTextConfig as ReferenceConfig
    from transformers import CLIPTextModel as Reference

    config = CLIPTextConfig.from_dict(values)
    shape = {k: v for k, v in dataclasses.asdict(config).items() if k != "dtype"}
    assert shape == {key: values[key] for key in shape}
    written = json.loads(json.dumps(config.to_dict()))
    assert CLIPTextConfig.from_dict(written) == config
    accepted = ReferenceConfig.from_dict(written)
    assert {key: getattr(accepted, key) for key in shape} == shape
    with torch.device("meta"):
        assert len(Reference(accepted).state_dict()) == 16 * config.num_hidden_layers + 4


def test_defaults_are_those_of_transformers():
    from transformers import CLIPTextConfig as ReferenceConfig

    reference = ReferenceConfig().to_dict()
    ours = {key: value for key, value in dataclasses.asdict(CLIPTextConfig()).items() if key != "dtype"}
    assert ours == {key: reference[key] for key in ours}
    assert CLIPTextConfig.from_dict(json.loads(ReferenceConfig().to_json_string(use_diff=False))) == CLIPTextConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("model_type", "t5"),
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("a_setting_of_tomorrow", 7),
    ],
)
def test_unsupported_settings_are_named(key, value):
    with pytest.raises(ValueError) as error:
        CLIPTextConfig.from_dict(SD_15 | {key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)
