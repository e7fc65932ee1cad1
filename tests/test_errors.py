"""Every error of the contract: one sentence that names the argument, what was got and what is allowed.

Each row of the table is called inside jax.eval_shape: the error comes while tracing, before anything is compiled.
"""

import ast
import inspect
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Array
from jax import export
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import jax_flash
from jax_flash import checker, masks, validate

B, SQ, SK, HQ, HK, D, DV = 2, 5, 7, 4, 2, 8, 16


def floats(*shape, dtype="float32"):
    return Array(shape, jnp.dtype(dtype))


def ints(*shape):
    return Array(shape, jnp.int32)


FIXED = dict(query=floats(B, SQ, HQ, D), key=floats(B, SK, HK, D), value=floats(B, SK, HK, DV))
PACKED = dict(
    query=floats(SQ, HQ, D), key=floats(SK, HK, D), value=floats(SK, HK, DV),
    cu_seqlens_q=ints(3), cu_seqlens_k=ints(3),
)  # fmt: skip
FULL = "[b hq sq sk] = (2, 4, 5, 7)"

WINDOW_OF_3 = (
    "; a query and the 2 keys before it (Gemma, Hugging Face, MaxText) are (2, 0), "
    "a query and the 3 keys before it (flash_attn) are (3, 0)"
)
IN_FLOAT32 = "must be within ±2e+38, as float32 needs it, got "
COMPILED, STATIC = "(it is compiled in), got a traced value", "close over it, or mark it static in jax.jit"
TRACED = f"must be a Python number {COMPILED}"
TINY = "softcap must be None, 0, or from 1.2e-38 to 1e+32 in float32 with a scale of 0.3536, got 1e-40"

BOTH = [  # (what is wrong, exception, sentence); both functions raise it, with their own name in front
    (dict(query=None), TypeError, "query must be an array, got None"),
    (dict(value="v"), TypeError, "value must be an array, got 'v'"),
    (dict(causal=1), TypeError, "causal must be True or False, got 1"),
    (dict(causal="yes"), TypeError, "causal must be True or False, got 'yes'"),
    (dict(causal=floats(dtype="bool")), TypeError, f"causal must be True or False {COMPILED}; {STATIC}"),
    (dict(deterministic=None), TypeError, "deterministic must be True or False, got None"),
    (dict(return_lse="no"), TypeError, "return_lse must be True or False, got 'no'"),
    (dict(window=3), TypeError, "window must be None or a pair (left, right), got 3" + WINDOW_OF_3),
    (dict(window=(1, 2, 3)), TypeError, "window must be None or a pair (left, right), got (1, 2, 3)"),
    (dict(window=(1.0, 0)), TypeError, "window's left must be an int ≥ 0 or None, got 1.0"),
    (dict(window=(0, True)), TypeError, "window's right must be an int ≥ 0 or None, got True"),
    (dict(window=(-1, 0)), ValueError, "window's left must be ≥ 0, or None for unlimited, got -1"),
    (dict(align="bottom"), ValueError, "align must be one of ('bottom_right', 'top_left'), got 'bottom'"),
    (dict(scale="1"), TypeError, "scale must be a Python number (it is compiled in), got str"),
    (dict(scale=True), TypeError, "scale must be a Python number (it is compiled in), got bool"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    (dict(scale=-1e60), ValueError, f"scale {IN_FLOAT32}-1e+60"),
    (dict(scale=floats()), TypeError, f"scale {TRACED}; multiply query by it and pass scale=1.0"),
    (dict(softcap=floats()), TypeError, f"softcap {TRACED}; {STATIC}"),
    (dict(softcap=1e60), ValueError, f"softcap {IN_FLOAT32}1e+60"),
    (dict(softcap=-2.5), ValueError, "softcap must be positive, or None or 0 for none, got -2.5"),
    (dict(softcap=1e-40), ValueError, TINY),
    (dict(softcap=[3.0]), TypeError, "softcap must be a Python number (it is compiled in), got list"),
    (dict(dropout_rate=1.0), ValueError, "dropout_rate must be in the range [0, 1), got 1.0"),
    (
        dict(dropout_rate=0.99999),
        ValueError,
        "dropout_rate must be below 1 when rounded to a multiple of 1/32768, got 0.99999",
    ),
    (dict(dropout_rate=float("nan")), ValueError, "dropout_rate must be in the range [0, 1), got nan"),
    (dict(dropout_rate=-0.1), ValueError, "dropout_rate must be in the range [0, 1), got -0.1"),
    (dict(dropout_rate=0.1), ValueError, "dropout_rate is 0.1, which needs a dropout_key (jax.random.key)"),
    (
        dict(dropout_rate=0.5, dropout_key=floats(2)),
        TypeError,
        "dropout_key must be one jax.random.key, got dtype float32 and shape (2,)",
    ),
    (
        dict(dropout_rate=0.5, dropout_key=Array((3, 2), jnp.uint32)),
        TypeError,
        "dropout_key must be one jax.random.key, got dtype uint32 and shape (3, 2)",
    ),
    (
        dict(dropout_rate=0.5, dropout_key=nnx.Rngs(0)),
        TypeError,
        "dropout_key must be one jax.random.key, got Rngs, which makes keys: pass rngs.dropout() or rngs()",
    ),
    (dict(dropout_rate=0.5, dropout_key=object()), TypeError, "dropout_key must be an array, got object"),
    (
        dict(implementation="cudnn"),
        ValueError,
        "implementation must be None or one of ('cpu', 'cuda', 'xla'), got 'cudnn'",
    ),
    (
        dict(sinks=floats(HQ, dtype="bfloat16")),
        TypeError,
        "sinks must be float32, got bfloat16; cast it with .astype('float32')",
    ),
    (
        dict(alibi_slopes=floats(HQ, dtype="float16")),
        TypeError,
        "alibi_slopes must be float32, got float16; cast it with .astype('float32')",
    ),
    (
        dict(alibi_slopes=floats(1)),
        ValueError,
        "alibi_slopes must have one slope for each of query's 4 heads, got (1,)",
    ),
    (
        dict(kv_lengths=floats(B)),
        TypeError,
        "kv_lengths must be int32, got float32; cast it with .astype('int32')",
    ),
    (dict(kv_lengths="7"), TypeError, "kv_lengths must be an array, got '7'"),
    (dict(kv_lengths=[7.0, 7.5]), TypeError, "kv_lengths must hold integers, got float64"),
    (
        dict(kv_lengths=[[1], [1, 2]]),
        ValueError,
        "kv_lengths must be an array, got lists of different lengths",
    ),
    (
        dict(kv_lengths=[1, 2**31]),
        ValueError,
        "kv_lengths holds 2147483648, allowed are the values of int32, at most 2147483647",
    ),
]

RANK = "mask must have rank 2 [sq sk] or 4 [b hq sq sk], got shape"
RANK_3 = ": [:, None] makes [b, 1, sq, sk] of it, [None] makes [1, hq, sq, sk]"
ONLY_FIXED = [
    (
        dict(sinks=floats(3)),
        ValueError,
        "sinks must have shape [hq] = (4,) or [b sq hq] = (2, 5, 4), got (3,)",
    ),
    (dict(query=floats(SQ, HQ, D)), ValueError, "query must have rank 4 [b sq hq d], got shape (5, 4, 8)"),
    (dict(key=floats(SK, D)), ValueError, "key must have rank 4 [b sk hk d], got shape (7, 8)"),
    (dict(value=floats()), ValueError, "value must have rank 4 [b sk hk dv], got shape ()"),
    (
        dict(query=floats(B, SQ, HQ, D, dtype="float8_e4m3fn")),
        TypeError,
        "query has dtype float8_e4m3fn, allowed are float16, bfloat16, float32",
    ),
    (
        dict(key=floats(B, SK, HK, D, dtype="bfloat16")),
        TypeError,
        "key has dtype bfloat16, which differs from query's float32; cast one of them by .astype(…)",
    ),
    (
        dict(value=floats(B, SK, HK, DV, dtype="float16")),
        TypeError,
        "value has dtype float16, which differs from query's float32; cast one of them by .astype(…)",
    ),
    (dict(key=floats(3, SK, HK, D)), ValueError, "key has batch size 3, which differs from query's 2"),
    (dict(value=floats(1, SK, HK, DV)), ValueError, "value has batch size 1, which differs from query's 2"),
    (dict(key=floats(B, SK, HK, 9)), ValueError, "key has head dim 9, which differs from query's 8"),
    (dict(value=floats(B, 6, HK, DV)), ValueError, "value has length 6, which differs from key's 7"),
    (dict(value=floats(B, SK, 1, DV)), ValueError, "value has head count 1, which differs from key's 2"),
    (
        dict(key=floats(B, SK, 3, D), value=floats(B, SK, 3, DV)),
        ValueError,
        "key has 3 heads, which does not divide query's 4",
    ),
    (
        dict(query=floats(B, SQ, 0, D)),
        ValueError,
        "query and key must have at least one head, got 0 and 2",
    ),
    (
        dict(query=floats(B, SQ, HQ, 0), key=floats(B, SK, HK, 0)),
        ValueError,
        "query must have a static head dim of at least 1, got 0",
    ),
    (
        dict(query=floats(B, SQ, HQ, 513), key=floats(B, SK, HK, 513)),
        ValueError,
        'query has head dim 513, allowed are 1 to 512; implementation="xla" takes any',
    ),
    (
        dict(value=floats(B, SK, HK, 600)),
        ValueError,
        'value has head dim 600, allowed are 1 to 512; implementation="xla" takes any',
    ),
    (
        dict(query=floats(B, 2**31, HQ, D)),
        ValueError,
        "query has length 2147483648, allowed are at most 2147483647",
    ),
    (dict(q_lengths=ints(3)), ValueError, "q_lengths must have shape [b] = (2,), got (3,)"),
    (dict(kv_lengths=ints(B, 1)), ValueError, "kv_lengths must have shape [b] = (2,), got (2, 1)"),
    (
        dict(segment_ids=ints(B, SQ)),
        ValueError,
        "segment_ids must be a pair (q_ids, kv_ids) when query's length 5 differs from key's 7",
    ),
    (
        dict(segment_ids=(ints(B, SQ),)),
        ValueError,
        "segment_ids must be one array or a pair (q_ids, kv_ids), got 1 items",
    ),
    (
        dict(segment_ids=[[0] * SQ] * 2),
        ValueError,
        "segment_ids must be one array or a pair (q_ids, kv_ids), got 2 lists of numbers; numpy.array makes one array "
        "of rows",
    ),
    (
        dict(segment_ids=(ints(B, SK), ints(B, SK))),
        ValueError,
        "segment_ids must have shape [b sq] = (2, 5), got (2, 7)",
    ),
    (
        dict(segment_ids=(ints(B, SQ), floats(B, SK))),
        TypeError,
        "segment_ids must be int32, got float32; cast it with .astype('int32')",
    ),
    (
        dict(mask=masks.causal),
        TypeError,
        "mask must be an array, got the function causal; pass what it returns",
    ),
    (
        dict(mask=floats(SQ, SK)),
        TypeError,
        "mask must be boolean (True = may attend), got float32; use bias for additive",
    ),
    (dict(mask=Array((6, SK), bool)), ValueError, f"mask must broadcast to {FULL}, got shape (6, 7)"),
    (dict(mask=Array((SK,), bool)), ValueError, f"{RANK} (7,)"),
    (dict(mask=Array((B, SQ, SK), bool)), ValueError, f"{RANK} (2, 5, 7)" + RANK_3),
    (dict(mask=Array((1, B, HQ, SQ, SK), bool)), ValueError, f"{RANK} (1, 2, 4, 5, 7)"),
    (
        dict(bias=ints(SQ, SK)),
        TypeError,
        "bias must be float16, bfloat16, float32, got int32; cast it with .astype('float32')",
    ),
    (dict(bias_first=1), TypeError, "bias_first must be True or False, got 1"),
    (dict(bias=floats(HK, SQ, SK)), ValueError, f"bias must broadcast to {FULL}, got shape (2, 5, 7)"),
    (dict(alibi_slopes=floats(3, HQ)), ValueError, "alibi_slopes must broadcast to [b hq] = (2, 4), got shape (3, 4)"),
]  # fmt: skip

ONLY_PACKED = [
    (
        dict(sinks=floats(1, HQ)),
        ValueError,
        "sinks must have shape [hq] = (4,) or [tq hq] = (5, 4), got (1, 4)",
    ),
    (dict(query=floats(B, SQ, HQ, D)), ValueError, "query must have rank 3 [tq hq d], got shape (2, 5, 4, 8)"),
    (dict(key=floats(SK, D)), ValueError, "key must have rank 3 [tk hk d], got shape (7, 8)"),
    (dict(value=floats(SK, HK, DV, 1)), ValueError, "value must have rank 3 [tk hk dv], got shape (7, 2, 16, 1)"),
    (dict(value=floats(6, HK, DV)), ValueError, "value has length 6, which differs from key's 7"),
    (dict(cu_seqlens_q=ints(1, 3)), ValueError, "cu_seqlens_q must have rank 1 [n+1], got shape (1, 3)"),
    (
        dict(cu_seqlens_q=ints(0), cu_seqlens_k=ints(0)),
        ValueError,
        "cu_seqlens_q must have n + 1 ≥ 1 offsets, got 0",
    ),
    (
        dict(cu_seqlens_k=None),
        ValueError,
        "cu_seqlens_k is needed when key has 7 tokens and query 5",
    ),
    (dict(cu_seqlens_k=ints(4)), ValueError, "cu_seqlens_k must have shape [n+1] = (3,), got (4,)"),
    (
        dict(cu_seqlens_k=floats(3)),
        TypeError,
        "cu_seqlens_k must be int32, got float32; cast it with .astype('int32')",
    ),
    (dict(kv_lengths=ints(3)), ValueError, "kv_lengths must have shape [n] = (2,), got (3,)"),
    (dict(alibi_slopes=floats(3, HQ)), ValueError, "alibi_slopes must broadcast to [n hq] = (2, 4), got shape (3, 4)"),
]  # fmt: skip

RING = FIXED | {"axis_name": "ring"}
MANUAL = "axis_name must name axes that are manual in the jax.shard_map around the call, ('ring',), got "
BY_HEADS = "mode=\"all_to_all\" gives each of the 2 devices along 'ring' as many heads"
ODD_HEADS = dict(query=floats(B, SQ, 3, D), key=floats(B, SK, 1, D), value=floats(B, SK, 1, DV))
ONLY_RING = [
    (dict(axis_name="other"), ValueError, MANUAL + "'other'"),
    (dict(axis_name=()), ValueError, MANUAL + "()"),
    (dict(axis_name=[["ring"]]), ValueError, MANUAL + "[['ring']]"),
    (dict(axis_name=("ring", "ring")), ValueError, MANUAL + "('ring', 'ring')"),
    (dict(order="striped"), ValueError, "order must be one of ('contiguous', 'zigzag'), got 'striped'"),
    (dict(order="zigzag"), ValueError, 'query has 5 tokens on each device; order="zigzag" needs an even number'),
    (dict(query=floats(B, 2**30, HQ, D)), ValueError, f"query has {2**31} tokens on 2 devices, allowed are 2147483647"),
    (dict(mode="gather"), ValueError, "mode must be one of ('ring', 'all_to_all'), got 'gather'"),
    (ODD_HEADS | dict(mode="all_to_all"), ValueError, BY_HEADS + ', and query has 3; mode="ring" takes any number'),
    (dict(bias=floats(SQ, SK)), ValueError, "bias must broadcast to [b hq sq sk] = (2, 4, 5, 14), got shape (5, 7)"),
]  # fmt: skip


def ring_attention(**arguments):
    """ring_attention on one of two devices; the arrays are the device's shards."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    call = partial(jax_flash.ring_attention, **{n: x for n, x in arguments.items() if n not in arrays})
    mesh, spec = AbstractMesh((2,), ("ring",), axis_types=(AxisType.Auto,)), PartitionSpec()
    run = jax.shard_map(lambda x: call(**x), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return run(arrays)


TABLE = [
    (function, defaults, wrong, error, message)
    for function, defaults, rows in (
        (jax_flash.flash_attention, FIXED, BOTH + ONLY_FIXED),
        (jax_flash.flash_attention_varlen, PACKED, BOTH + ONLY_PACKED),
        (ring_attention, RING, ONLY_RING),
    )
    for wrong, error, message in rows
]


def trace(function, arguments):
    """jax.eval_shape over the arrays among the arguments."""
    leaves, structure = jax.tree.flatten(arguments, is_leaf=lambda x: x is None)
    traced = {n: x for n, x in enumerate(leaves) if isinstance(x, Array)}

    def run(traced):
        return function(**jax.tree.unflatten(structure, [traced.get(n, x) for n, x in enumerate(leaves)]))

    return jax.eval_shape(run, traced)


@pytest.mark.parametrize(
    ("function", "defaults", "wrong", "error", "message"),
    TABLE,
    ids=[f"{function.__name__}-{message}" for function, _, _, _, message in TABLE],
)
def test_wrong_arguments_raise_one_sentence_while_tracing(function, defaults, wrong, error, message):
    with pytest.raises(error) as caught:
        trace(function, defaults | wrong)
    assert type(caught.value) is error
    assert str(caught.value) == f"{function.__name__}: {message}"


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(jax_flash.flash_attention, FIXED), (jax_flash.flash_attention_varlen, PACKED), (ring_attention, RING)],
)
def test_the_table_starts_from_right_arguments(function, arguments):
    out, lse = trace(function, arguments | {"return_lse": True})
    assert out.shape == (*arguments["query"].shape[:-1], DV)
    assert lse.shape == (*out.shape[:-3], HQ, SQ)


def test_every_raise_of_the_checks_is_in_the_table():
    """Every `raise` line of these modules must be where some call of this file fails, so no message is untested."""
    reached = set()
    for function, defaults, wrong, _, _ in TABLE:
        reached |= raising_lines(lambda f=function, a=defaults | wrong: trace(f, a))
    check, numbers = checker.Checker("f"), [partial(jax_flash.zigzag_positions, 8, n) for n in (2.0, 0)]
    numbers += [partial(check.divisor, "k_scale", 0), partial(check.page_layout, "dhn")]
    numbers += [lambda: check.array("query", jax.new_ref(0.0)), lambda: check.bias("bias", 1j, "float32")]
    for call in (symbolic_heads, symbolic_head_dim, symbolic_shard, *numbers):
        reached |= raising_lines(call)
    for module in (checker, validate):
        source = inspect.getsource(module)
        lines = {node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)}
        missing = [source.splitlines()[n - 1] for n in lines if (module.__file__, n) not in reached]
        assert not missing


def raising_lines(call):
    try:
        call()
    except Exception as error:
        return {(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)}
    return set()


def symbolic_heads():
    (h,) = export.symbolic_shape("h")
    trace(jax_flash.flash_attention, FIXED | {"query": floats(B, SQ, h, D)})


def symbolic_shard():
    (s,) = export.symbolic_shape("s")
    trace(ring_attention, RING | {"query": floats(B, s, HQ, D)})


def symbolic_head_dim():
    (d,) = export.symbolic_shape("d")
    trace(jax_flash.flash_attention, FIXED | {"query": floats(B, SQ, HQ, d), "key": floats(B, SK, HK, d)})


def test_symbolic_heads_and_head_dims_are_refused():
    of_heads = "flash_attention: the numbers of heads must be static, got query h, key 2"
    of_head_dim = "flash_attention: query must have a static head dim of at least 1, got d"
    for call, message in ((symbolic_heads, of_heads), (symbolic_head_dim, of_head_dim)):
        with pytest.raises(ValueError, match=message):
            call()
