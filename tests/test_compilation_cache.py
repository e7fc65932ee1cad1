"""The persistent compilation cache: a process finds the programs of earlier processes, and never another spec's."""

import dataclasses
import gc
import re

import jax
import numpy as np
import pytest
from cases import Case, make_inputs
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, attention, report, require_devices, start_python, with_gradients

from jax_flash.spec import AppendSpec, AttentionSpec, Reach

# Runs two specs of equal shapes, on one device and on four in several ways. For each call it reports whether the cache
# had its program, and how far its result is from plain JAX.
PROGRAM = """
import json, sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

directory, portable = sys.argv[1], sys.argv[2] == "portable"
jax.config.update("jax_compilation_cache_dir", directory)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", portable)

from cases import Case, make_inputs
from jax_flash import append_kv, paged_attention
from programs import attention, with_gradients

case = Case("cached", b=4, sq=8, sk=8, hq=4, hk=4, d=8, dv=8)
window = case.replace(window=(1, 1))
SPECS = {"window": window, "window and softcap": window.replace(softcap=0.5)}
arrays = make_inputs(case).positional
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

def placed(axis_names, *spec):
    return NamedSharding(mesh.update(axis_names=axis_names), P(*spec))

PLACES = {
    "one": None,
    "batch and heads": placed(("data", "model"), "data", None, "model"),
    "batch and heads, of axes in the other order": placed(("model", "data"), "data", None, "model"),
    "batch and sequence": placed(("data", "model"), "data", "model"),
}
events = Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))

def distance(a, b):
    differences = jax.tree.map(lambda x, y: abs(jax.device_get(x) - jax.device_get(y)).max(), a, b)
    return float(max(jax.tree.leaves(differences)))

found = {}

def add(name, run, arrays, wanted):
    events.clear()
    got = jax.block_until_ready(run(arrays))
    found[name] = {"hits": events["cache_hits"], "misses": events["cache_misses"], "distance": distance(got, wanted)}

for name, spec in SPECS.items():
    wanted = jax.jit(with_gradients(attention(spec, "xla")))(arrays)
    for place, sharding in PLACES.items():
        @jax.jit
        def run(arrays):  # of the same name for all: nothing but the spec tells them apart
            return with_gradients(attention(spec))(arrays)

        add(f"{name}, {place}", run, arrays if sharding is None else jax.device_put(arrays, sharding), wanted)

tables = jnp.arange(4, dtype=jnp.int32)[:, None]
for causal in (False, True):
    def run(arrays, implementation=None):
        q, k, v = arrays["query"], arrays["key"], arrays["value"]
        pools = append_kv(k, v, k[:, :2], v[:, :2], tables, 3, implementation=implementation)
        return pools[:2], paged_attention(q, *pools[:2], tables, 7, causal=causal, implementation=implementation)

    wanted = jax.jit(partial(run, implementation="xla"))(arrays)  # op by op compiles fifty programs
    add(f"pages, causal={causal}", jax.jit(run), jax.device_put(arrays, placed(("data", "model"), None, None, "data")), wanted)
print(json.dumps(found))
"""  # noqa: E501


def run(directory, flag):
    return report(start_python(PROGRAM, str(directory), flag, devices=4))


@pytest.mark.parametrize("flag", ["default", "portable"])
def test_later_processes_find_what_earlier_ones_compiled_and_never_another_spec(tmp_path, flag):
    """In JAX's cache key the names of partitioners, some of which hold an object's address, may be in or left out."""
    first, second = run(tmp_path, flag), run(tmp_path, flag)
    assert len(first) == 10
    for name in first:
        assert first[name]["hits"] == 0, name
        assert first[name]["misses"] > 0, name
        assert second[name]["hits"] > 0, name
        assert second[name]["misses"] == 0, name
        for outcome in (first, second):
            assert outcome[name]["distance"] < 1e-4, name


CASE = Case("cached", b=4, sq=8, sk=8, hq=4, hk=4, d=8, dv=8, causal=True)


def lowered(case=CASE, first=0, axes=("data", "model"), shape=(2, 2), grad=True):
    """The program on the devices from `first` on."""
    require_devices(first + 4)
    mesh = Mesh(
        np.array(jax.devices()[first : first + 4]).reshape(shape), axes, axis_types=(AxisType.Auto,) * 2
    )
    call = with_gradients(attention(case)) if grad else attention(case)
    arrays = jax.device_put(make_inputs(case).positional, NamedSharding(mesh, P(axes[0], None, axes[1])))
    return jax.jit(call).lower(arrays), arrays


def partitioners(program):
    """The names by which XLA finds the partitioners of a program."""
    found = re.findall(r'@CustomSPMDPartitioning\(.*?backend_config = "(\w+)"', program.as_text())
    assert found
    return set(found)


def test_partitioners_have_a_name_for_what_they_do(kernel):
    names = partitioners(lowered()[0])
    assert partitioners(lowered()[0]) == names == partitioners(lowered(first=4)[0])
    assert len(names) == 2  # forward and backward
    assert partitioners(lowered(grad=False)[0]) < names
    for other in (
        dict(case=CASE.replace(scale=0.5)),
        dict(case=CASE.replace(window=(1, 0))),
        dict(axes=("data", "heads")),
        dict(shape=(4, 1)),
    ):
        assert not partitioners(lowered(**other)[0]) & names


@pytest.mark.parametrize("dropped", [0, 1])
def test_programs_that_share_a_partitioner_do_not_need_each_other(kernel, dropped):
    """Two equal programs for different devices share the partitioner of the first; either must outlive the other."""
    made = [lowered(first=0), lowered(first=4)]
    del made[dropped]
    gc.collect()
    ((program, arrays),) = made
    assert_same(program.compile()(arrays), jax.jit(with_gradients(attention(CASE, "xla")))(arrays))


def test_partitioners_go_with_their_programs(kernel):
    from jax._src.custom_partitioning import _sharding_callbacks

    case = CASE.replace(scale=0.123)
    program, arrays = lowered(case)
    names = {name.encode() for name in partitioners(program)}
    assert names <= set(_sharding_callbacks.keys())
    del program, arrays
    jax.clear_caches()
    gc.collect()
    assert not names & set(_sharding_callbacks.keys())


OTHER_VALUES = {
    bool: True,
    int: 7,
    float: 0.7,
    str: "other",
    tuple: ("sinks",),
    type(None): "cpu",
    Reach: Reach(left=7),
}


@pytest.mark.parametrize("spec", [AttentionSpec("fixed"), AppendSpec("append")], ids=lambda s: s.layout)
def test_specs_that_differ_in_any_one_field_have_different_names(spec):
    """In the cache, only the name of the partitioned function tells the programs of two specs apart."""
    for field in dataclasses.fields(spec):
        other = OTHER_VALUES[type(getattr(spec, field.name))]
        assert dataclasses.replace(spec, **{field.name: other}).digest() != spec.digest(), field.name
