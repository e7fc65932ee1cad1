"""The models of examples/models: what they compute, how they are loaded, and generate.py --model.

The expected results are those of `transformers`, recorded in models_golden.json for weights that both make from the
tensors' names; test_models_transformers.py compares more, where `transformers` is installed.
"""

import json
from functools import lru_cache

import numpy as np
import pytest
import tiny_models as tiny
from conftest import IMPLEMENTATION

pytest.importorskip("flax")

import generate
from flax import nnx
from models import MODELS, CheckpointError, load
from models.cache import PagedCache, make_pools
from models.checkpoint import read_tensors
from models.config import Config
from models.gemma4_config import Gemma4Config
from models.gpt_oss import from_mxfp4
from models.rope import make_rope
from pretrained import whole_logits
from scheduler import Batch

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lru_cache(lambda kind: tiny.golden_checkpoint(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module")
def served(folder):
    return lru_cache(lambda kind: tiny.serve(folder(kind), attention=IMPLEMENTATION))


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


# ---- what they compute


def test_every_model_is_tried():
    assert set(tiny.CONFIGS) == set(MODELS)


@pytest.mark.parametrize("kind", MODELS)
def test_the_served_text_and_logits_are_those_of_transformers(kind, served):
    golden, (_, requests) = tiny.golden(kind), served(kind)
    assert [request.generated for request in requests] == golden["generated"]
    assert distance([request.logits[0] for request in requests], golden["logits"]) < 2e-5


@pytest.mark.parametrize("kind", MODELS)
def test_a_token_at_a_time_from_pages_is_the_whole_sequence_at_once(kind, served):
    """Within a tolerance, since from pages DeepSeek V3 multiplies by its latents in another order."""
    source, requests = served(kind)
    whole = whole_logits(source.model, requests)
    assert distance(np.concatenate([request.logits for request in requests]), whole) < 2e-5


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text"])
def test_images_in_pages_are_seen_both_ways(kind, folder):
    """One step has two prompts with images, which all tokens of an image see; later steps have a token of each."""
    model = load(folder(kind), attention=IMPLEMENTATION)
    tokens, spans, images = tiny.text_with_images()
    whole = np.asarray(nnx.jit(lambda m, *x: m(x[0], spans=x[1], images=x[2]))(model, tokens, spans, images))
    assert distance(whole, nnx.jit(lambda m, x: m(x))(model, tokens)) > 0.1

    @nnx.jit
    def step(model, pools, batch, spans, images):
        cache = PagedCache(model.kv_shapes, pools, batch)
        return model(batch.tokens, cache, spans=spans, images=images), cache.pools

    pools = make_pools(model.kv_shapes, pages=10, page_size=4, dtype="float32")
    tables = np.arange(10, dtype=np.int32).reshape(2, 5)
    for start, stop in ((0, 18), (18, 19), (19, 20)):
        now, count = np.s_[:, start:stop], stop - start
        batch = Batch(
            tokens[now].reshape(-1),
            positions=np.tile(np.arange(start, stop, dtype=np.int32), 2),
            cu_seqlens=np.array([0, count, 2 * count], np.int32),
            block_tables=tables,
            cached=np.full(2, start, np.int32),
            numbers=np.zeros(2, np.int32),
        )
        packed = images[now].reshape(2 * count, -1)
        logits, pools = step(model, pools, batch, spans[now].reshape(-1), packed)
        assert distance(logits, whole[:, stop - 1]) < 1e-5


# ---- how they are loaded


def test_in_bfloat16_weights_and_cache_are_bfloat16(tmp_path):
    path = tiny.golden_checkpoint(tmp_path, "qwen3", tiny.BFLOAT16)
    source, requests = tiny.serve(path, tiny.PROMPTS[:1], 2, attention=IMPLEMENTATION)
    assert source.model.model.embed_tokens.embedding.dtype == "bfloat16"
    assert requests[0].logits[0].dtype == np.float32
    golden = tiny.golden("qwen3")["logits"][0]
    assert 1e-4 < distance(requests[0].logits[0], golden) < 0.3
    assert source.check(requests).passed


def test_a_checkpoint_of_several_files(folder, tmp_path):
    tensors = read_tensors(folder("llama"))
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        tiny.write_safetensors(tmp_path / file, {n: tensors[n] for n in names if files[n] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    found = nnx.to_flat_state(nnx.state(load(tmp_path)))
    right = dict(nnx.to_flat_state(nnx.state(load(folder("llama")))))
    assert all((x[...] == right[path][...]).all() for path, x in found)

    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-2-of-2\.safetensors"):
        load(tmp_path)


def test_a_checkpoint_with_an_image_encoder(tmp_path):
    """Gemma 3: such a checkpoint has the text model's fields and weights in another place. The encoder is left out."""
    entry = tiny.golden("gemma3_text")
    tensors = tiny.weights("gemma3_text", entry["tensors"])
    for i, prefix in enumerate(("language_model.model.", "model.language_model.")):
        renamed = {name.replace("model.", prefix, 1): x for name, x in tensors.items()}
        renamed["vision_tower.weight"] = np.zeros(3, np.float32)
        config = {"model_type": "gemma3", "text_config": entry["config"]}
        model = load(tiny.write_checkpoint(tmp_path / str(i), config, renamed))
        assert (model.model.norm.weight[...] == tensors["model.norm.weight"]).all()


def test_weights_of_four_bits():
    """gpt-oss: two numbers a byte, the low half first, and a power of two for every 32."""
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    blocks = np.full((1, 2, 1, 16), 0x21, np.uint8)
    blocks[0, 1, 0, :4] = [0x80, 0xF7, 0x94, 0x56]
    weights = from_mxfp4(blocks, np.array([[[127], [125]]], np.uint8))
    assert (weights.shape, weights.dtype) == ((1, 32, 2), "bfloat16")
    assert weights[0, :, 0].tolist() == [numbers[1], numbers[2]] * 16
    assert (4 * weights[0, :8, 1]).tolist() == [0, 0, 6, -6, 2, -0.5, 4, 3]


def test_weights_of_eight_bits(tmp_path):
    """DeepSeek V3: float8 and a factor per block; blocks at an edge are smaller. The layer that predicts a further
    token is not read."""
    entry = tiny.golden("deepseek_v3")
    tensors = tiny.weights("deepseek_v3", entry["tensors"])
    config, stored = tiny.in_float8(entry["config"], tensors)
    assert stored["model.layers.0.self_attn.q_b_proj.weight_scale_inv"].shape == (24, 2)  # [96, 12] in 4 × 8
    stored["model.layers.3.eh_proj.weight"] = np.zeros(3, np.float32)
    model = load(tiny.write_checkpoint(tmp_path / "float8", config, stored))
    found = dict(nnx.to_flat_state(nnx.state(model)))
    right = dict(
        nnx.to_flat_state(nnx.state(load(tiny.golden_checkpoint(tmp_path / "float32", "deepseek_v3"))))
    )
    for path, x in right.items():
        error = distance(found[path][...], x[...]) / np.abs(x[...]).max()
        assert error < 2**-4, path
    kernel = np.asarray(found["model", "layers", 0, "self_attn", "q_b_proj", "kernel"][...]).T
    name = "model.layers.0.self_attn.q_b_proj.weight"
    factors, weights = stored[f"{name}_scale_inv"], stored[name].astype(np.float32)
    assert kernel[5, 11] == weights[5, 11] * factors[1, 1]


def test_latents_are_all_that_the_cache_keeps(folder):
    """DeepSeek V3: 16 numbers and 8 rotated ones a token and layer, in one pool."""
    (pool,) = make_pools(load(folder("deepseek_v3")).kv_shapes, pages=5, page_size=4, dtype="float32")
    assert (pool.k_pages.shape, pool.v_pages) == ((3 * 5, 4, 1, 24), None)


def test_layers_that_read_another_s_keys_keep_none(folder):
    """Gemma 4: the last two of 4 layers do so; layers without a window have another head dim."""
    pools = make_pools(load(folder("gemma4_text")).kv_shapes, pages=5, page_size=4, dtype="float32")
    assert [pool.k_pages.shape for pool in pools] == [(5, 4, 2, 16), (5, 4, 1, 24)]


def test_configurations_of_gemma_4_mean_the_same():
    """The sizes of layers without a window may be given by name, by layer, or by default."""
    json = dict(tiny.golden("gemma4_text")["config"])
    by_layer = Gemma4Config.from_json(json)
    assert (by_layer.heads(0), by_layer.heads(1)) == ((2, 16), (1, 24))
    assert [by_layer.source(i) for i in range(4)] == [0, 1, 0, 1]
    del json["per_layer_config"]
    assert Gemma4Config.from_json(json | dict(global_head_dim=24, num_global_key_value_heads=1)) == by_layer
    json |= dict(layer_types=None, num_hidden_layers=7, num_kv_shared_layers=0, attention_k_eq_v=False)
    assert [Gemma4Config.from_json(json).heads(i) for i in range(7)] == [(2, 16)] * 5 + [(2, 512), (2, 16)]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func is 'softmax'; DeepSeek V3 has 'sigmoid'"),
        ("deepseek_v3", dict(topk_method="greedy"), "topk_method is 'greedy'; DeepSeek V3 has 'noaux_tc'"),
        ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq is 2; DeepSeek V3 has 1"),
        ("deepseek_v3", dict(num_key_value_heads=2), "num_key_value_heads is 2; DeepSeek V3 has 4"),
        ("deepseek_v3", dict(quantization_config=dict(quant_method="awq")), "quant_method is 'awq'; DeepSeek V3 has"),
        ("deepseek_v3", dict(kv_lora_rank=None), "config.json lacks kv_lora_rank"),
        ("gemma4_text", dict(use_bidirectional_attention="all"), "use_bidirectional_attention is 'all'; Gemma 4 has"),
        ("gemma4_text", dict(attention_bias=True), "attention_bias is True; Gemma 4 has False"),
        ("gemma4_text", dict(per_layer_config={"0": {"head_dim": 8}}), "per_layer_config is .*; Gemma 4 has heads by"),
    ],
)  # fmt: skip
def test_settings_that_a_model_does_not_have_are_refused(kind, change, message, tmp_path):
    entry = tiny.golden(kind)
    with pytest.raises(ValueError, match=message):
        load(tiny.write_checkpoint(tmp_path / "changed", entry["config"] | change, {}))


def test_configurations_of_older_checkpoints_mean_the_same():
    new = tiny.golden("llama")["config"]
    parameters = dict(new["rope_parameters"])
    old = {name: x for name, x in new.items() if name not in ("rope_parameters", "dtype", "head_dim")}
    old |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters, "torch_dtype": "bfloat16"}
    old["hidden_size"] = 64  # head_dim = 64 / 4
    config = Config.from_json(old)
    assert (config.dtype, config.head_dim) == ("bfloat16", 16)
    assert make_rope(16, config.rope_parameters) == make_rope(16, new["rope_parameters"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: t.pop("model.norm.weight"), r"lacks 1 tensors, model\.norm\.weight among them"),
        (lambda c, t: t.update(rotary=np.zeros(3, np.float32)), "does not know 1 of the tensors, rotary among"),
        (lambda c, t: c.update(intermediate_size=40), r"has shape \(32, 40\); the checkpoint's is \(32, 48\)"),
        (lambda c, t: c.update(model_type="gpt2"), "model_type 'gpt2'; the examples have .*llama"),
        (lambda c, t: c.update(hidden_act="relu"), "hidden_act is 'relu'; the examples have silu"),
        (lambda c, t: c["rope_parameters"].update(rope_type="su"), "rope_type is 'su'; the examples have 'default'"),
        (lambda c, t: c.pop("vocab_size"), r"config\.json lacks vocab_size"),
    ],
)  # fmt: skip
def test_what_is_not_the_model_is_refused(change, message, tmp_path):
    entry = tiny.golden("llama")
    tensors = tiny.weights("llama", entry["tensors"])
    change(entry["config"], tensors)
    with pytest.raises(ValueError, match=message):
        load(tiny.write_checkpoint(tmp_path / "changed", entry["config"], tensors))


# ---- the command


def run(folder, *options):
    return generate.main(["--model", str(folder), "--attention", IMPLEMENTATION, *options])


def test_generate_serves_a_checkpoint_and_checks_its_logits(folder, capsys):
    prompts = [option for prompt in tiny.PROMPTS for option in ("--prompt", " ".join(map(str, prompt)))]
    options = ["--temperature", "0", "--max-tokens", str(tiny.NEW_TOKENS), "--pages", "16", "--chunk", "8"]
    assert run(folder("llama"), *prompts, *options) == 0
    out = capsys.readouterr().out
    for prompt, tokens in zip(tiny.PROMPTS, tiny.golden("llama")["generated"]):
        assert f"{len(prompt)} tokens of prompt" in out
        assert f"{' '.join(map(str, prompt))} »{' '.join(map(str, tokens))} \n" in out
    assert "Llama3, 2 × 32, float32" in out
    assert out.rstrip().endswith("1.0e-04 allowed: passed")


def test_a_token_that_ends_the_text_ends_it(folder):
    from pretrained import Pretrained
    from scheduler import Request

    source = Pretrained(str(folder("llama")), "auto", "auto")
    assert source.stop == frozenset()
    request = Request(0, [1, 2], max_tokens=5, stop=frozenset([9]))
    for token, finished in ((3, False), (9, True)):
        request.tokens.append(token)
        assert request.finished is finished
    assert not Request(0, [1, 9], max_tokens=5, stop=frozenset([9])).finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "1 two"], "has no tokenizer.json, so a prompt is numbers below 53"),
        (["--prompt", "53"], "has no tokenizer.json, so a prompt is numbers below 53"),
        (["--prompt", ""], "has no tokenizer.json, so a prompt is numbers below 53"),
        (["--max-tokens", "64"], "the model and the cache have room for 64 together"),
    ],
)
def test_requests_that_cannot_be_served(folder, options, message, capsys):
    assert run(folder("llama"), *options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_checkpoint(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "has no config.json; name the folder of a Hugging Face checkpoint" in capsys.readouterr().err


def test_a_mesh_is_refused(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(folder("llama"), "--mesh", "heads=2")
    assert "--mesh is 'heads=2'; the models of --model run on one device" in capsys.readouterr().err
