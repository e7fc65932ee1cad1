"""Serving: every page is free or owned, and no request's text depends on which others are served."""

import re
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATION
from flax import nnx
from programs import collectives, custom_calls, require_devices, shard_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import generate
import logit_check
from logit_check import check_logits
from model import ModelConfig, Transformer
from scheduler import PrefixIndex, Request, Scheduler, ServingConfig
from serving import serve_transformer
from settings import Settings
from training import Checkpoints, History, Trainer, make_mesh

pytestmark = pytest.mark.usefixtures("exact_products")

SIZES = {"layers": 2, "width": 32, "heads": 2, "head_dim": 16, "hidden": 64}
SERVING = ServingConfig(pages=24, page_size=4, slots=6, chunk=16, max_length=64)


def make_model(mesh, attention=IMPLEMENTATION, dtype="float32"):
    """A random model whose text depends on its prompt, because attention weighs more than in an untrained model."""
    config = ModelConfig(**SIZES, dtype=dtype, attention=attention)
    with jax.set_mesh(mesh):
        model = Transformer(config, rngs=nnx.Rngs(0))
        for block in model.blocks:
            block.attention.qkv.kernel[...] *= 2
            block.attention.out.kernel[...] *= 4
    return model, config


def make_server(serving=SERVING, model_axis=1, dtype="float32"):
    require_devices(model_axis)
    mesh = make_mesh({"data": 1, "heads": model_axis, "sequence": 1})
    model, config = make_model(mesh, dtype=dtype)
    weights = jax.device_put(nnx.state(model), nnx.get_named_sharding(nnx.state(model), mesh))
    nnx.update(model, weights)
    return serve_transformer(model, config, serving, mesh)


cached_server = lru_cache(make_server)  # a server without requests is like a new one


def make_requests(count, seed=0):
    """Prompts of 1 to 40 tokens, most of which share their first tokens with others, and 1 to 16 tokens to generate."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, 256, (5, 28))
    starts[:, 4:8] = starts[0, 4:8]  # equal tokens after different ones: their page must not be shared
    requests = []
    for number in range(count):
        start = starts[random.integers(5), : random.integers(1, 29)]
        own = random.integers(0, 256, random.integers(0, 13))
        requests.append(Request(number, [*start.tolist(), *own.tolist()], int(random.integers(1, 17))))
    return requests


@partial(jax.jit, donate_argnums=0)
def poison(cache, pages):
    """The cache with NaN in the pages that `pages [p]` is true for."""
    return jax.tree.map(lambda pool: jnp.where(pages[:, None, None, None], jnp.nan, pool), cache)


def poison_free_pages(server):
    allocator = server.scheduler.allocator
    free = np.array([not allocator.owners(page) for page in range(allocator.pages)])
    server.cache = poison(server.cache, np.tile(free, SIZES["layers"]))


def serve(server, requests, gap=0.0, seed=0):
    """Serves the requests, on average `gap` steps apart. Free pages hold NaN throughout."""
    random = np.random.default_rng(seed)
    coming, longest_line = list(requests), 0
    while coming or server.scheduler.busy:
        for _ in range(random.poisson(1 / gap) if gap else len(coming)):
            if coming:
                server.submit(coming.pop(0))
        longest_line = max(longest_line, len(server.scheduler.waiting))
        poison_free_pages(server)
        if server.scheduler.busy:
            server.step()
    return longest_line


@pytest.fixture(scope="module")
def generate_alone():
    """Greedy generation by the training model in plain JAX, which recomputes the whole text for every token."""
    graph, weights = nnx.split(
        make_model(make_mesh({"data": 1, "heads": 1, "sequence": 1}), attention="xla")[0]
    )
    positions = jnp.arange(SERVING.max_length)[None]

    @jax.jit
    def extend(tokens, length):
        model = nnx.merge(graph, weights)
        logits = model(tokens[None], positions, jnp.array([[0, SERVING.max_length]]))[0, length - 1]
        return tokens.at[length].set(jnp.argmax(logits).astype(tokens.dtype))

    def alone(request):
        tokens = np.zeros(SERVING.max_length, np.int32)
        tokens[: len(request.prompt)] = request.prompt
        length = len(request.prompt)
        for _ in range(request.max_tokens):
            tokens, length = extend(tokens, length), length + 1
        return np.asarray(tokens)[len(request.prompt) : length].tolist()

    return alone


# ---- serving


def test_200_requests_that_come_and_go_get_what_they_would_get_alone(generate_alone):
    server, requests = make_server(), make_requests(200)
    longest_line = serve(server, requests, gap=2.0)
    for request in requests:
        assert request.generated == generate_alone(request), f"request {request.number}"

    scheduler, usage = server.scheduler, server.usage
    assert (scheduler.allocator.free, scheduler.allocator.shared) == (SERVING.pages, 0)
    assert len(scheduler.prefixes) == 0
    # The run is hard enough only if requests waited, shared pages, and were preempted by older ones.
    assert longest_line >= 5
    assert usage.peak_pages == SERVING.pages
    assert usage.peak_shared >= 4
    assert scheduler.preempted >= 5
    assert sum(request.reused for request in requests) > 500


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_are_the_training_forwards(dtype):
    """The logits of serving equal those of the training model's forward pass."""
    server, requests = cached_server(dtype=dtype), make_requests(8)
    serve(server, requests)
    check = check_logits(*make_model(server.mesh, dtype=dtype), server.mesh, requests)
    assert check.passed, check
    assert check.training == 0 if dtype == "float32" else 1e-3 < check.training < 0.2

    requests[3].logits[-1] = requests[3].logits[-1][::-1]
    assert not check_logits(*make_model(server.mesh, dtype=dtype), server.mesh, requests).passed


def test_a_mesh_serves_the_same_text_as_one_device():
    alone, sharded = make_requests(12), make_requests(12)
    serve(cached_server(), alone)
    server = cached_server(model_axis=2)
    serve(server, sharded)
    assert [r.generated for r in sharded] == [r.generated for r in alone]
    assert {shard.data.shape for shard in server.cache[0].addressable_shards} == {(48, 4, 1, 16)}


def test_sampled_text_does_not_depend_on_what_else_is_served():
    serving = replace(SERVING, temperature=1.0, seed=1)
    together = make_requests(10)
    serve(cached_server(serving), together)
    server = cached_server(serving)
    for request in make_requests(10)[3:6]:
        serve(server, [request])
        assert request.generated == together[request.number].generated


def test_another_seed_samples_another_text():
    texts = []
    for seed in (1, 2):
        requests = make_requests(4)
        serve(cached_server(replace(SERVING, temperature=1.0, seed=seed)), requests)
        texts.append([request.generated for request in requests])
    assert texts[0] != texts[1]


def copies_of_a_pool(program, model_axis):
    """The instructions of a compiled program's text that copy a pool of the cache."""
    pool = f"f32[48,4,{2 // model_axis},16]"
    assert pool in program
    lines = (line.split(", metadata=")[0] for line in program.splitlines())
    return [line for line in lines if pool in line and re.search(r" copy(-start)?\(", line)]


@pytest.mark.parametrize("model_axis", [1, 2])
def test_the_step_writes_the_donated_cache_in_place(model_axis):
    server = make_server(model_axis=model_axis)
    pools = 2  # all layers share one pool of keys and one of values
    for program in (program.as_text() for program in server.programs.values()):
        assert not copies_of_a_pool(program, model_axis)
        aliases = program.split("\n", 1)[0]
        assert len(re.findall("(?:may|must)-alias", aliases)) == pools, aliases
    before = server.cache
    server.submit(make_requests(1)[0])
    server.step()
    assert all(pool.is_deleted() for pool in jax.tree.leaves(before))

    batch = server._place(server.scheduler.batch([], SERVING.chunk))
    kept = jax.jit(server._step.__wrapped__).lower(server.weights, server.cache, batch).compile()
    assert (
        len(copies_of_a_pool(kept.as_text(), model_axis)) >= pools
    )  # a step without donation copies the pools


def test_the_step_needs_no_memory_as_large_as_a_layers_pages(kernel):
    """The pools of all layers are updated in place, and a layer's part of them is never a temporary array."""
    serving = replace(SERVING, pages=4096)
    server = make_server(serving)
    of_a_layer = serving.pages * serving.page_size * SIZES["heads"] * SIZES["head_dim"] * 4
    for program in server.programs.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == 2 * SIZES["layers"] * of_a_layer
        assert memory.temp_size_in_bytes < of_a_layer


def test_layers_do_not_share_pages():
    """Each layer writes to its own part of the pools, to pages of the same numbers."""
    server = make_server()
    server.submit(Request(0, [1, 2, 3, 4, 5], max_tokens=1))
    server.step()
    written = [np.flatnonzero(np.asarray(pool).any((1, 2, 3))) for pool in server.cache]
    for pages in written:
        of_layers = pages.reshape(SIZES["layers"], 2)
        assert (of_layers == of_layers[0] + SERVING.pages * np.arange(SIZES["layers"])[:, None]).all()


def test_on_a_mesh_each_device_writes_and_reads_its_own_heads_and_only_sums_are_exchanged(kernel):
    for program in cached_server(model_axis=2).programs.values():
        text = program.as_text()
        assert custom_calls(text) == {"append": SIZES["layers"], "forward": SIZES["layers"]}
        assert collectives(text) == {"all-reduce": 2 * SIZES["layers"]}
        assert {shape[-2] for name in ("append", "forward") for shape in shard_shapes(text, name)} == {1}


# ---- who is served next


def plan_and_commit(scheduler, token=0):
    """The number of tokens that a step serves of each request: {request number: tokens}."""
    chunks = scheduler.plan()
    served = {chunk.request.number: chunk.count for chunk in chunks}
    scheduler.commit(chunks, np.full(len(chunks), token))
    return served


def test_prompts_are_taken_in_in_chunks_beside_requests_that_decode():
    """A long prompt is prefilled in chunks, each in a step that also decodes a token of every running request."""
    scheduler = Scheduler(ServingConfig(pages=32, page_size=4, slots=3, chunk=8, max_length=64))
    for number, length in enumerate((3, 12, 2, 2)):
        scheduler.submit(Request(number, [number] * length, max_tokens=3))
    assert plan_and_commit(scheduler) == {0: 3, 1: 5}
    assert plan_and_commit(scheduler) == {0: 1, 1: 7}
    assert plan_and_commit(scheduler) == {0: 1, 1: 1, 2: 2}  # request 3 waits for a slot
    assert plan_and_commit(scheduler) == {1: 1, 2: 1, 3: 2}


def test_a_request_shares_the_full_pages_of_one_that_joins_in_the_same_step():
    scheduler = Scheduler(ServingConfig(pages=8, page_size=4, slots=2, chunk=32, max_length=64))
    first, second = (Request(number, [*range(9), number], max_tokens=2) for number in range(2))
    scheduler.submit(first)
    scheduler.submit(second)
    assert plan_and_commit(scheduler) == {0: 10, 1: 2}
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]
    assert (scheduler.allocator.in_use, scheduler.allocator.shared) == (4, 2)
    plan_and_commit(scheduler)
    assert (scheduler.allocator.free, len(scheduler.prefixes)) == (8, 0)


def test_the_youngest_stands_back_when_pages_run_out_and_goes_on_later():
    """The youngest request is preempted: it gives its pages back and waits until there are pages again."""
    scheduler = Scheduler(ServingConfig(pages=3, page_size=2, slots=2, chunk=8, max_length=6))
    old, young = Request(0, [1, 2], max_tokens=4), Request(1, [3, 4], max_tokens=2)
    scheduler.submit(old)
    scheduler.submit(young)
    assert plan_and_commit(scheduler) == {0: 2, 1: 2}
    # Request 0 takes the last page, and the younger request needs one more.
    assert plan_and_commit(scheduler) == {0: 1}
    assert (list(scheduler.waiting), young.pages, scheduler.preempted) == ([young], [], 1)
    while scheduler.busy:
        plan_and_commit(scheduler)
    assert len(old.generated) == 4
    assert len(young.generated) == 2
    assert scheduler.allocator.free == 3


def test_what_could_never_be_served_is_refused():
    scheduler = Scheduler(ServingConfig(pages=4, page_size=4, slots=2, chunk=8, max_length=64))
    with pytest.raises(
        ValueError, match=r"request 0 has 12 prompt tokens and 5 .* have room for 16 together"
    ):
        scheduler.submit(Request(0, [0] * 12, max_tokens=5))
    with pytest.raises(ValueError, match="request 1 has 0 prompt tokens"):
        Request(1, [], max_tokens=5)
    with pytest.raises(ValueError, match="chunk is 2; it must be at least slots, which is 3"):
        ServingConfig(slots=3, chunk=2)


def test_pages_are_found_by_all_the_tokens_up_to_their_end_and_while_they_are_owned():
    prefixes = PrefixIndex(page_size=2)
    prefixes.add([1, 2, 3, 4, 5], [7, 8, 9], start=0, stop=5)
    assert prefixes.find([1, 2, 3, 4, 5]) == [7, 8]  # page 9 is not full
    assert prefixes.find([1, 2, 3, 4]) == [7]  # the last token must be computed, to predict the next one
    assert prefixes.find([1, 2, 9, 9, 9]) == [7]
    assert prefixes.find([3, 4, 5]) == []  # the same tokens, but not after 1, 2
    prefixes.forget([8, 9])
    assert prefixes.find([1, 2, 3, 4, 5]) == [7]


# ---- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The --out folder of a training run that saved its model before the first step."""
    out = tmp_path_factory.mktemp("run")
    settings = Settings(**SIZES, row_length=128, out=str(out))
    trainer = Trainer(settings, make_mesh({"data": 1, "heads": 1, "sequence": 1}))
    Checkpoints(settings).save(trainer.create(), History(losses=[5.5]))
    return out


def run(out, *options):
    return generate.main([*options, "--out", str(out), "--attention", IMPLEMENTATION])


def test_it_streams_held_out_text_with_speed_cache_use_and_a_check_of_its_logits(checkpoint, capsys):
    assert run(checkpoint, "--requests", "6", "--max-tokens", "12", "--page-size", "8", "--pages", "40") == 0
    out = capsys.readouterr().out
    assert [f"── {number}: " in out for number in range(6)] == [True] * 6
    assert len(re.findall(r"└ [\d,]+ tokens/s; \d+ pages in use, \d+ of them shared, \d+ free", out)) == 6
    assert "from shared pages" in out
    assert out.rstrip().endswith("1.0e-04 allowed: passed")
    assert "at the end 0 pages in use, 0 of them shared, 40 free" in out


def test_it_goes_on_from_prompts_on_a_mesh_as_on_one_device(checkpoint, capsys):
    require_devices(2)
    texts = []
    for mesh in ("heads=1", "heads=2"):
        options = ["--prompt", "first é", "--prompt", "", "--temperature", "0", "--max-tokens", "9"]
        assert run(checkpoint, *options, "--mesh", mesh) == 0
        texts.append(re.findall(r"»[^└]*", capsys.readouterr().out))
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_logits_that_are_too_far_off_fail_it(checkpoint, capsys, monkeypatch):
    """The command exits with 1 if the logits differ too much from the training model's."""
    monkeypatch.setattr(logit_check, "TOLERANCE", 0.0)
    assert run(checkpoint, "--prompt", "x", "--max-tokens", "4") == 1
    assert "TOO FAR" in capsys.readouterr().out


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "nothing"):
        assert run(out) == 2
        assert f"which holds no checkpoint; train one with `python examples/train_lm.py --out {out}`" in (
            capsys.readouterr().err
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mesh heads=3", "--mesh is heads=3, which does not divide the model's 2 heads"),
        (
            "--prompt 123456789 --max-tokens 119",
            "has 10 prompt tokens and 119 tokens to generate; the model and the",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused(checkpoint, options, message, capsys):
    assert run(checkpoint, *options.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mesh data=2", "--mesh is 'data=2'; serving splits only the heads over devices, as in heads=2"),
        ("--mesh 2", "--mesh is '2'; it must be data=N,heads=M,sequence=L"),
        ("--page-size 0", "--page-size is 0; it must be at least 1"),
        ("--chunk 4", "--chunk is 4; it must be at least --slots, which is 8"),
        ("--temperature nan", "--temperature is nan; it must be finite and at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate.main(options.split())
    assert message in capsys.readouterr().err
