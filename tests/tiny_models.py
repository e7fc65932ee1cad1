"""Tiny checkpoints of the models of examples/models, and what `transformers` computes from them.

`models_golden.json` has for each model the config.json and the names and shapes of the tensors that `transformers`
writes, and its results for the weights of `weights` below; `make models MODELS_WRITE=1` writes it again.
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

GOLDEN = Path(__file__).with_name("models_golden.json")
PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32], [38, 46, 26], [4, 33, 8, 3, 27, 9, 50]]
NEW_TOKENS = 10
VOCABULARY = 53

SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# model_type → the arguments of its configuration in transformers
CONFIGS = {
    "llama": dict(
        SIZES,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10_000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "deepseek_v3": dict(
        {name: x for name, x in SIZES.items() if name != "head_dim"},
        num_key_value_heads=4,
        num_hidden_layers=3,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e4,
            factor=4.0,
            mscale=1.0,
            mscale_all_dim=0.7,
            beta_fast=8.0,
            beta_slow=1.0,
            original_max_position_embeddings=16,
        ),
    ),
    "gemma3_text": dict(
        SIZES,
        num_hidden_layers=3,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=24,
        final_logit_softcapping=8.0,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            "sliding_attention": dict(rope_type="default", rope_theta=1e4),
        },
    ),
    "gemma4_text": dict(  # options that several models have
        SIZES,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        global_head_dim=24,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=20,
        final_logit_softcapping=8.0,
        use_bidirectional_attention="vision",
    ),
    "gpt_oss": dict(
        SIZES,
        sliding_window=6,
        num_local_experts=6,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=150.0,
            factor=8.0,
            beta_fast=4.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen3": dict(SIZES, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
}


def golden(kind):
    """The entry of a model: config, tensors (name → shape), logits after the first prompt, generated tokens."""
    return json.loads(GOLDEN.read_text())[kind]


def weights(kind, shapes):
    """Weights of these names and shapes, each drawn by its name, large enough for the text to depend on the prompt."""
    return {name: _weight(kind, name, shape) for name, shape in shapes.items()}


def _weight(kind, name, shape):
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        one = ("norm" in name or "scal" in name) and kind != "gemma3_text"
        # Gemma 4 does not divide its scores by √d.
        size = 0.25 if kind == "gemma4_text" and name.endswith("q_norm.weight") else 1.0
        return (size * (one + 0.3 * draw)).astype(np.float32)
    # With larger embeddings, a token's own embedding would decide the next token.
    size = 0.1 if "embed" in name else 1.5 / np.sqrt(shape[-1])
    return (size * draw).astype(np.float32)


def write_checkpoint(folder, config, tensors):
    """A checkpoint as `save_pretrained` writes it: config.json and one file of tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_safetensors(file, tensors):
    """The tensors in the safetensors format."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    names |= {"int64": "I64", "uint8": "U8"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        places = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": tensor.shape, "data_offsets": places}
        offset = places[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    file.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *data]))


def golden_checkpoint(folder, kind, dtype=np.float32):
    """Writes the checkpoint whose results golden(kind) has."""
    entry = golden(kind)
    tensors = {name: x.astype(dtype) for name, x in weights(kind, entry["tensors"]).items()}
    config = dict(entry["config"], dtype=np.dtype(dtype).name)
    return write_checkpoint(folder, config, tensors)


BFLOAT16 = ml_dtypes.bfloat16
FLOAT8_BLOCK = (4, 8)  # sides of the blocks of `in_float8`


def in_float8(config, tensors):
    """A checkpoint (config, tensors) with the projections in float8 and a factor for each block, as DeepSeek V3's."""
    quantization = dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=FLOAT8_BLOCK
    )
    found = {}
    for name, x in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = x
            continue
        sides = [-(-size // block) * block for size, block in zip(x.shape, FLOAT8_BLOCK)]
        padded = np.zeros(sides, np.float32)
        padded[: x.shape[0], : x.shape[1]] = x
        blocks = padded.reshape(-1, FLOAT8_BLOCK[0], sides[1] // FLOAT8_BLOCK[1], FLOAT8_BLOCK[1])
        factors = np.abs(blocks).max((1, 3)) / 448
        scaled = (blocks / factors[:, None, :, None]).reshape(sides)[: x.shape[0], : x.shape[1]]
        found[name] = scaled.astype(ml_dtypes.float8_e4m3fn)
        found[f"{name}_scale_inv"] = factors
    return dict(config, quantization_config=quantization), found


def text_with_images():
    """Tokens [2, 20], which image each belongs to (−1: text), and vectors [2, 20, width] of the images."""
    draw = np.random.default_rng(2)
    spans = np.full((2, 20), -1, np.int32)
    spans[0, 2:11], spans[0, 13:18], spans[1, :3] = 0, 1, 1  # one is longer than the window of 6
    tokens = draw.integers(0, VOCABULARY, (2, 20)).astype(np.int32)
    return tokens, spans, draw.standard_normal((2, 20, SIZES["hidden_size"])).astype(np.float32)


def serve(path, prompts=PROMPTS, new_tokens=NEW_TOKENS, **changes):
    """Serves the prompts together from a small paged cache, greedily: (what is served, its finished requests)."""
    from pretrained import Pretrained
    from scheduler import Request, ServingConfig

    source = Pretrained(str(path), **{"attention": "auto", "dtype": "auto", **changes})
    server = source.server(ServingConfig(pages=32, page_size=4, slots=8, chunk=8, max_length=64))
    requests = [Request(i, list(prompt), new_tokens) for i, prompt in enumerate(prompts)]
    for request in requests:
        server.submit(request)
    while server.scheduler.busy:
        server.step()
    return source, requests
