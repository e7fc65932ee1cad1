"""The calls of the scaling suite, on one device and on several."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash

from . import peers
from .adapters import Attend
from .cases import Case, Inputs
from .measure import Calls

AXIS = "sequence"
SHARD = P(None, AXIS)
COPY_ENGINES = "copy engines"  # used instead of the kernels of NCCL, which occupy SMs
OPTIONS = {COPY_ENGINES: {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}}  # --… in XLA_FLAGS
Prepared = tuple[Callable[..., Any], tuple[Any, ...]]  # a function to compile, and its arguments
_COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def mesh_of(count: int, *axes: tuple[str, int]) -> Mesh:
    """A mesh of the first `count` devices, by default with one axis."""
    names, sizes = zip(*(axes or ((AXIS, count),)))
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes), devices=jax.devices()[:count])


def options(case: Case) -> dict[str, Any]:
    return {"causal": case.causal, "window": case.window}


def whole(case: Case) -> Attend:
    """The ordinary call: on one device, or sharded by XLA as its operands are."""
    return lambda q, k, v, _: jax_flash.flash_attention(q, k, v, **options(case))


def ring(case: Case, mesh: Mesh, **how: Any) -> Attend:
    """The call inside shard_map; `how` is its order and mode."""
    call = partial(jax_flash.ring_attention, axis_name=AXIS, **options(case), **how)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(SHARD,) * 3, out_specs=SHARD)
    return lambda q, k, v, _: mapped(q, k, v)


def draw(case: Case, mesh: Mesh, spec: P) -> Inputs:
    """Random operands, made on the devices of the mesh."""
    shapes = [(case.b, case.sq, case.hq, case.d)] + 2 * [(case.b, case.sk, case.hk, case.d)]
    keys = jax.random.split(jax.random.key(0), 4)
    sharding = NamedSharding(mesh, spec)
    make = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharding)
    q, k, v, dout = (make(key, shape, case.dtype) for key, shape in zip(keys, [*shapes, shapes[0]]))
    return Inputs({"query": q, "key": k, "value": v}, {}, dout, jnp.zeros(()))


def prepare(attend: Attend, pass_: str, inputs: Inputs) -> Prepared:
    """One pass of a call."""
    call, (arguments,) = peers.pass_calls(attend, pass_, [inputs])
    return call, arguments


def compiled(jobs: dict[str, Prepared]) -> Calls:
    """The programs, all of which have to compile."""
    calls, refused = compiled_or_refused(jobs)
    if refused:
        raise RuntimeError(f"benchmarks: {refused}")
    return calls


def compiled_or_refused(jobs: dict[str, Prepared]) -> tuple[Calls, dict[str, Any]]:
    """The programs that compile, and the reasons of those that do not. A name may end with a comma and a key of
    `OPTIONS`.

    They are compiled in parallel and run one by one, because the collectives of two programs may wait for each other.
    """
    workers = None if jax.default_backend() == "gpu" else 1
    lowered = {name: call.lower(*arguments) for name, (call, arguments) in jobs.items()}

    def compile_one(name: str) -> Any:
        try:
            return lowered[name].compile(compiler_options=OPTIONS.get(name.rpartition(", ")[2]))
        except jax.errors.JaxRuntimeError as error:
            return {"refused": peers.why(error)}

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    refused = {name: x for name, x in found.items() if isinstance(x, dict)}
    return {name: (x, [jobs[name][1]]) for name, x in found.items() if name not in refused}, refused


def collectives(program: Any) -> list[str]:
    """The collectives of a compiled program."""
    return sorted(_COLLECTIVE.findall(program.as_text()))


# --- what is timed ----------------------------------------------------------------------------------------------


def sequence_jobs(case: Case, pass_: str, count: int, drawn: dict[int, Inputs]) -> dict[str, Prepared]:
    """The call on one device, and with its sequence split over `count` devices in every way. `drawn` has the inputs for
    each number of devices."""
    mesh = mesh_of(count)
    ways: dict[str, Attend] = {"contiguous": ring(case, mesh)}
    if case.window is None:
        ways["all_to_all"] = ring(case, mesh, mode="all_to_all")
        if case.causal:
            ways["zigzag"] = ring(case, mesh, order="zigzag")
        elif pass_ == "both":
            ways["jit"] = whole(case)
    jobs = {"one device": prepare(whole(case), pass_, drawn[1])}
    jobs |= {name: prepare(attend, pass_, drawn[count]) for name, attend in ways.items()}
    rings = [
        name for name in ways if name in ("zigzag", "jit") or (name == "contiguous" and "zigzag" not in ways)
    ]
    if jax.default_backend() == "gpu":
        jobs |= {f"{name}, {COPY_ENGINES}": jobs[name] for name in rings}
    return jobs


def sharded_jobs(case: Case, pass_: str, count: int) -> dict[str, Prepared]:
    """The call on one device, and split by XLA along the batch, the heads and, if 4 divides `count`, along both."""
    specs = {"batch": P("data"), "heads": P(None, None, "heads")}
    meshes = {"batch": mesh_of(count, ("data", count)), "heads": mesh_of(count, ("heads", count))}
    if count % 4 == 0:
        specs["batch × heads"] = P("data", None, "heads")
        meshes["batch × heads"] = mesh_of(count, ("data", 2), ("heads", count // 2))
    jobs = {"one device": prepare(whole(case), pass_, draw(case, mesh_of(1), P()))}
    return jobs | {
        name: prepare(whole(case), pass_, draw(case, meshes[name], spec)) for name, spec in specs.items()
    }


def link_jobs(count: int, sizes: tuple[int, ...]) -> dict[str, Prepared]:
    """Each device sends an array to the next one, or a part of it to each of the others."""
    mesh, jobs = mesh_of(count), {}
    pairs = [(device, (device + 1) % count) for device in range(count)]
    calls = {
        "ppermute": lambda x: lax.ppermute(x, AXIS, pairs),
        "all_to_all": lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True),
    }
    for size in sizes:
        shape = (count * size // 2,)
        x = jax.jit(partial(jnp.zeros, shape, jnp.bfloat16), out_shardings=NamedSharding(mesh, P(AXIS)))()
        for name, call in calls.items():
            if name == "ppermute" or size == max(sizes):
                mapped = jax.shard_map(call, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
                jobs[f"{name} {size_name(size)}"] = jax.jit(mapped), (x,)
    return jobs


def size_name(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


# --- a layer, for its memory ------------------------------------------------------------------------------------


def layer_job(case: Case, count: int) -> Prepared:
    """The gradient of one attention layer of width hq·d in its weights and its input, in zigzag order."""
    mesh = mesh_of(count)
    attend = ring(case, mesh, order="zigzag") if count > 1 else whole(case)
    width = case.hq * case.d

    def loss(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("bsw,whd->bshd", x, w) for w in weights["qkv"])
        out = attend(q, k, v, None)
        return jnp.square((x + jnp.einsum("bshd,hdw->bsw", out, weights["out"])).astype(jnp.float32)).mean()

    everywhere, by_token = NamedSharding(mesh, P()), NamedSharding(mesh, SHARD)
    shapes = {"qkv": (3, width, case.hq, case.d), "out": (case.hq, case.d, width)}
    weights = {
        name: jax.device_put(np.full(shape, width**-0.5, case.dtype), everywhere)
        for name, shape in shapes.items()
    }
    make = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=by_token)
    x = make(jax.random.key(0), (case.b, case.sq, width), case.dtype)
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(everywhere, by_token))
    return gradient, (weights, x)


def program_bytes(program: Any) -> dict[str, int]:
    """The memory that a compiled program needs on each device, as XLA reports it."""
    found = program.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes - found.alias_size_in_bytes,
        "results": found.output_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    return parts | {"all": sum(parts.values())}
