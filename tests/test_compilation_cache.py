"""The persistent compilation cache: later processes find what earlier ones compiled, never another spec's."""

import dataclasses

import pytest
from programs import report, start_python

from jax_flash.spec import AppendSpec, AttentionSpec

# Runs two specs of equal shapes, on one device and on four, and tells of each call whether the cache had it
# and how far it is from plain JAX.
PROGRAM = """
import json, sys
from collections import Counter

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

directory, portable = sys.argv[1], sys.argv[2] == "portable"
jax.config.update("jax_compilation_cache_dir", directory)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", portable)

from cases import Case, make_inputs
from programs import attention, with_gradients

case = Case("cached", b=4, sq=8, sk=8, hq=4, hk=4, d=8, dv=8)
window = case.replace(window=(1, 1))
SPECS = {"window": window, "window and softcap": window.replace(softcap=0.5)}
arrays = make_inputs(case).positional
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
sharded = jax.device_put(arrays, NamedSharding(mesh, P("data", None, "model")))

events = Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))

def distance(a, b):
    differences = jax.tree.map(lambda x, y: abs(jax.device_get(x) - jax.device_get(y)).max(), a, b)
    return float(max(jax.tree.leaves(differences)))

found = {}
for name, spec in SPECS.items():
    wanted = jax.jit(with_gradients(attention(spec, "xla")))(arrays)
    for devices, placed in (("one", arrays), ("four", sharded)):
        @jax.jit
        def run(arrays):  # of the same name for all: nothing but the spec tells them apart
            return with_gradients(attention(spec))(arrays)

        events.clear()
        got = jax.block_until_ready(run(placed))
        found[f"{name}, {devices}"] = {
            "hits": events["cache_hits"], "misses": events["cache_misses"], "distance": distance(got, wanted)
        }
print(json.dumps(found))
"""


def run(directory, flag):
    return report(start_python(PROGRAM, str(directory), flag, devices=4))


def test_later_processes_find_what_earlier_ones_compiled_and_never_another_spec(tmp_path):
    """On one device whatever the flags; on several once JAX leaves its own pointer out of the key."""
    first = run(tmp_path, "portable")
    second = run(tmp_path, "portable")
    default = run(tmp_path, "default")
    for name in first:
        assert first[name]["hits"] == 0, name
        assert first[name]["misses"] > 0, name
        assert second[name]["hits"] > 0, name
        assert second[name]["misses"] == 0, name
        assert (default[name]["hits"] > 0) == name.endswith("one"), name
        for outcome in (first, second, default):
            assert outcome[name]["distance"] < 1e-4, name


OTHER_VALUES = {bool: True, int: 7, float: 0.7, str: "other", tuple: ("sinks",), type(None): "cpu"}


@pytest.mark.parametrize("spec", [AttentionSpec("fixed"), AppendSpec("append")], ids=lambda s: s.layout)
def test_specs_that_differ_in_any_one_field_have_different_names(spec):
    """The name of the partitioned function is all that tells their programs apart in the cache."""
    for field in dataclasses.fields(spec):
        other = OTHER_VALUES[type(getattr(spec, field.name))]
        assert dataclasses.replace(spec, **{field.name: other}).digest() != spec.digest(), field.name
