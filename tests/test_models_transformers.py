"""The models of examples/models against `transformers`, on tiny random checkpoints. `make models` runs this file."""

import importlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if "JAX_FLASH_MODELS" not in os.environ:
    pytest.skip(
        "`make models` runs this, with the transformers of its golden results", allow_module_level=True
    )
torch = pytest.importorskip("torch", reason="torch and transformers are not installed; run `make models`")
transformers = pytest.importorskip(
    "transformers", reason="torch and transformers are not installed; run `make models`"
)

import tiny_models as tiny  # noqa: E402
from flax import nnx  # noqa: E402
from models import load  # noqa: E402
from models.checkpoint import as_stored, read_safetensors, tensor_names  # noqa: E402

pytestmark = pytest.mark.usefixtures("exact_products")
KINDS = list(tiny.CONFIGS)
TOLERANCE = 2e-5
# Gemma 4 normalises numbers that may be small (each layer's own embeddings, behind a gate), which amplifies rounding.
# With larger scores, transformers itself was 3e-5 from its own results in float64.
TOLERANCES = {"gemma4_text": 1e-4}


def original(kind, folder):
    """transformers' model with the weights of `tiny.weights`, saved in the folder."""
    config = transformers.AutoConfig.for_model(kind, **tiny.CONFIGS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    shapes = {name: list(x.shape) for name, x in read_safetensors(folder / "model.safetensors")}
    tiny.write_safetensors(folder / "model.safetensors", tiny.weights(kind, shapes))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model, shapes


def generate(model, prompt):
    """(the tokens, their logits [tokens, vocabulary]) of greedy generation with transformers' cache."""
    result = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=tiny.NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits).numpy()


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, shapes = original(request.param, folder)
    return request.param, folder, model, shapes


def test_logits(checkpoint):
    kind, folder, model, _ = checkpoint
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(load(folder)(jnp.asarray(tokens)) - expected).max() < TOLERANCES.get(kind, TOLERANCE)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients(checkpoint, remat):
    _, folder, model, _ = checkpoint
    tokens = np.random.default_rng(1).integers(0, tiny.VOCABULARY, (2, 24))
    model.zero_grad()
    logits = model(torch.tensor(tokens)).logits[:, :-1].reshape(-1, tiny.VOCABULARY)
    torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[:, 1:].reshape(-1))).backward()
    expected = {name: x.grad for name, x in model.named_parameters()}

    def loss(model):
        each = jax.nn.log_softmax(model(jnp.asarray(tokens))[:, :-1])
        return -jnp.take_along_axis(each, jnp.asarray(tokens)[:, 1:, None], -1).mean()

    own = load(folder, remat=remat)
    found = nnx.to_flat_state(nnx.grad(loss)(own))
    names = tensor_names(own)
    assert len(found) == len(expected)
    for path, gradient in found:
        right = expected[names[path]].numpy()
        assert np.abs(as_stored(path, np.asarray(gradient[...])) - right).max() < 1e-5 * max(
            1, np.abs(right).max()
        ), path


def test_paged_generation_token_by_token(checkpoint):
    _, folder, model, _ = checkpoint
    _, requests = tiny.serve(folder)
    for request in requests:
        tokens, logits = generate(model, request.prompt)
        assert request.generated == tokens
        assert np.abs(np.array(request.logits) - logits).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text"])
def test_images_are_seen_both_ways(kind, tmp_path):
    """Compares with the masks that transformers makes, in which each token of an image sees the whole image; in Gemma 4
    only layers with a window do so."""
    module = importlib.import_module(
        "transformers.models.{0}.modeling_{0}".format(kind.removesuffix("_text"))
    )
    model, _ = original(kind, tmp_path)
    tokens, spans, images = tiny.text_with_images()
    ids, image = torch.tensor(tokens), torch.tensor(spans >= 0)
    x = torch.where(image[..., None], torch.tensor(images), model.model.embed_tokens(ids))
    made = module.create_masks_for_vision_model(model.config, x, None, None, None, torch.tensor(spans))
    options = {}
    if kind == "gemma4_text":  # in a batch with images, padding too has its embedding in each layer
        options["per_layer_inputs"] = model.model.get_per_layer_inputs(torch.where(image, 0, ids))
    with torch.no_grad():
        expected = model(inputs_embeds=x, attention_mask=made, **options).logits.numpy()
    own = load(tmp_path)(jnp.asarray(tokens), spans=jnp.asarray(spans), images=jnp.asarray(images))
    assert np.abs(own - expected).max() < TOLERANCES.get(kind, TOLERANCE)


SETTINGS = {
    "deepseek_v3, no latents of queries": dict(q_lora_rank=None, rope_interleave=False, attention_bias=True),
    "deepseek_v3, one group": dict(
        norm_topk_prob=False, n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=1.5
    ),
    "deepseek_v3, no YaRN": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "gemma4_text, as 31B": dict(
        num_kv_shared_layers=0, hidden_size_per_layer_input=0, enable_moe_block=False
    ),
    "gemma4_text, as E2B": dict(attention_k_eq_v=False, use_double_wide_mlp=False, enable_moe_block=False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path, monkeypatch):
    kind = name.partition(",")[0]
    monkeypatch.setitem(tiny.CONFIGS, kind, tiny.CONFIGS[kind] | SETTINGS[name])
    model, _ = original(kind, tmp_path)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(load(tmp_path)(jnp.asarray(tokens)) - expected).max() < TOLERANCES.get(kind, TOLERANCE)
    prompt = tiny.PROMPTS[0]
    assert tiny.serve(tmp_path, [prompt])[1][0].generated == generate(model, prompt)[0]


def test_float8_weights(tmp_path):
    entry = tiny.golden("deepseek_v3")
    tensors = tiny.weights("deepseek_v3", entry["tensors"])
    # transformers takes whole blocks only.
    whole = {n: x for n, x in tensors.items() if all(a % b == 0 for a, b in zip(x.shape, tiny.FLOAT8_BLOCK))}
    config, stored = tiny.in_float8(entry["config"], whole)
    folder = tiny.write_checkpoint(tmp_path / "float8", config, tensors | stored)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(
            dequantize=True, weight_block_size=tiny.FLOAT8_BLOCK
        ),
    )
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(load(folder)(jnp.asarray(tokens)) - expected).max() < TOLERANCE


def test_mxfp4_weights():
    from models.gpt_oss import from_mxfp4
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = draw.integers(110, 130, (2, 6, 3), np.uint8)
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    assert (from_mxfp4(blocks, scales).astype(np.float32) == expected.float().numpy()).all()


def test_the_golden_results_are_these(checkpoint):
    kind, folder, model, shapes = checkpoint
    generated = [generate(model, prompt) for prompt in tiny.PROMPTS]
    entry = {
        "config": json.loads((folder / "config.json").read_text()),
        "tensors": shapes,
        "logits": [[float(f"{x:.6g}") for x in logits[0]] for _, logits in generated],
        "generated": [tokens for tokens, _ in generated],
    }
    if os.environ.get("JAX_FLASH_WRITE_GOLDEN"):
        entries = json.loads(tiny.GOLDEN.read_text()) if tiny.GOLDEN.exists() else {}
        tiny.GOLDEN.write_text(_lines({**entries, kind: entry}))
    golden = tiny.golden(kind)
    assert golden["generated"] == entry["generated"]
    assert golden["tensors"] == entry["tensors"]
    assert np.abs(np.array(golden["logits"]) - entry["logits"]).max() < TOLERANCE


def _lines(entries):
    """JSON with a line for each part of an entry."""
    parts = (
        f' "{kind}": {{\n' + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in entry.items()) + "\n }"
        for kind, entry in entries.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"
