"""append_kv into float8 pools: rounding, scales, and keys that are float8 already."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, cu_seqlens
from pages import FLOAT8, require
from test_append import DV, HK, D, arguments, by_token, check, run

from jax_flash import append_kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("scales", ["neither", "k_scale", "both"])
def test_float8_pools_hold_the_value_over_its_scale(implementation, dtype, float8, scales):
    require(implementation)
    call = arguments(dtype=dtype, pool_dtype=float8, new=(3, 0, 4))
    given = {"neither": (), "k_scale": ("k_scale",), "both": ("k_scale", "v_scale")}[scales]
    # With 1.7 some quotients are ties, and XLA, which multiplies by the reciprocal, is on another side of them.
    call |= {name: jnp.asarray([0.003, 1.9], jnp.float32) for name in given}
    check(call, implementation)


@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("new", [3, (3, 0, 4)])
def test_float8_keys_and_values_are_stored_as_they_are(implementation, float8, new):
    """Every byte is kept, the sign of zero included; plain JAX keeps NaN, but not which."""
    call = arguments(pool_dtype=float8, new=new)
    for name in ("key", "value", "k_pages", "v_pages"):
        bits = np.random.default_rng(len(name)).integers(0, 256, call[name].shape, np.uint8)
        call[name] = jnp.asarray(bits.view(float8))
    got = append_kv(**call, implementation=implementation)
    numbers = {n: call[n].view("uint8").astype("float32") for n in ("key", "value", "k_pages", "v_pages")}
    wide = append_kv(**call | numbers, implementation="xla")
    for x, y in zip(got[:2], wide[:2], strict=True):
        wanted = np.asarray(y).astype("uint8")
        same = np.asarray(x.view("uint8")) == wanted
        if implementation == "xla":
            same |= np.isnan(np.asarray(x, np.float32)) & np.isnan(wanted.view(float8).astype(np.float32))
        assert same.all()
    np.testing.assert_array_equal(got[2], wide[2])


@pytest.mark.parametrize("float8", FLOAT8)
def test_a_scale_may_be_one_number(implementation, float8):
    call = arguments(pool_dtype=float8, new=3)
    heads = call["key"].shape[-2]
    of_heads = {"k_scale": jnp.full(heads, 0.5), "v_scale": jnp.full(heads, 2.0)}
    wanted = append_kv(**call | of_heads, implementation=implementation)
    for one in ({"k_scale": 0.5, "v_scale": 2}, {"k_scale": jnp.float32(0.5), "v_scale": np.float32(2)}):
        got = append_kv(**call | one, implementation=implementation)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_rounds_to_even_saturates_and_keeps_nan(implementation, float8):
    """Every tie between neighbouring float8, the numbers next to it, and numbers past the largest."""
    require(implementation)
    numbers = np.arange(128, dtype=np.uint8).view(float8).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), numbers])
    special = [448, 449, 464, 465, 57344, 57345, 61439, 61440, 65536, 1e6, np.inf, np.nan, 1e-40, 0.0]
    special += [2.0**-i for i in (10, 11, 17, 18)]
    values = np.concatenate([beside, special, -beside, np.negative(special)]).astype(np.float32)
    values = np.resize(values, (-(-values.size // (D * HK)), HK, D))
    call = arguments(pool_dtype=float8, size=8, entries=10, lengths=(0, 0, 0), new=(values.shape[0], 0, 0))
    call |= {"key": jnp.asarray(values), "value": jnp.asarray(values[..., :DV])}
    call["cu_seqlens"] = cu_seqlens((values.shape[0], 0, 0))
    got = run(call, implementation)
    for x, y in zip(got, by_token(call), strict=True):  # the sign of a NaN is not specified
        np.testing.assert_array_equal(np.asarray(x, np.float32), y.astype(np.float32))
