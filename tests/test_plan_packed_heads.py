"""plan() chooses between decode and the Hopper forward whose tiles hold all query heads of a KV head. Needs no GPU."""

from __future__ import annotations

import pytest
from plans import A100
from plans import plan_decode as plan


@pytest.mark.parametrize(("q_rows", "heads", "tiles"), [(16, 32, 1), (8, 64, 1), (33, 32, 2), (16, 128, 2)])
def test_more_rows_than_decode_reads_at_once_take_the_forward_that_packs_heads(q_rows, heads, tiles):
    """The grid counts tokens, of which a tile of 128 rows holds those of a KV head's query heads."""
    chosen = plan(q_rows=q_rows, heads=heads)
    assert (chosen["row"]["pass"], chosen["row"]["block_m"], chosen["row"]["block_n"]) == (
        "forward",
        128,
        128,
    )
    assert chosen["queries"] == {"block": 128 * 8 // heads, "tiles": tiles, "blocks": 64 * 8 * tiles}


@pytest.mark.parametrize(("d", "rows"), [(64, 32), (128, 32), (256, 16), (512, 16)])
def test_decode_reads_keys_at_most_twice_where_heads_can_be_packed(d, rows):
    """Its kernels of head dims above 128 have 8 rows."""
    for pages in ({"page_size": 64}, {"paged": False}):
        few, more = (
            plan(batch=132, q_rows=1, heads=heads, kv_heads=1, d=d, dv=d, **pages)["row"]
            for heads in (rows, 2 * rows)
        )
        assert few["pass"] == "decode"
        assert more["design"] == "packed_heads"


@pytest.mark.parametrize(
    "options",
    [
        {"left": 100},
        {"softcap": 30.0},
        {"scale": -1.0},
        {"operands": ("sinks",)},
        {"operands": ("alibi_slopes", "draft_mask")},
        {"float8": True, "softcap": 30.0},
    ],
    ids=str,
)
def test_options_that_the_packed_forward_has(options):
    """Though the forward over pages that does not pack heads has a kernel for the softcap alone."""
    assert plan(q_rows=16, right=0, **options)["row"]["design"] == "packed_heads"


def test_decode_reads_keys_once_where_tiles_are_many():
    """With few tiles it reads them twice, because it splits the keys of long sequences."""
    for d, q_rows in ((64, 5), (128, 8), (256, 4)):
        call = {"d": d, "dv": d, "q_rows": q_rows, "right": 0}
        for option in ({}, {"softcap": 30.0}, {"left": 1023}, {"operands": ("alibi_slopes",)}):
            assert plan(**option, **call, batch=66)["row"]["design"] == "packed_heads"
            assert plan(**option, **call, batch=33)["row"]["pass"] == "decode"
            assert plan(**option, **call | {"q_rows": q_rows // 2}, batch=66)["row"]["pass"] == "decode"


def test_packed_sequences():
    """Decode runs those with few rows before. They are taken to have equally many tokens."""
    few = {"varlen": True, "q_rows": 5 * 64, "right": 0}
    # Decode takes those of average length where it would not read keys many times, because it splits them.
    for options, of_decode in (
        ({}, 8),
        ({"batch": 8, "q_rows": 8 * 32}, 8),
        ({"softcap": 30.0}, 8),
        ({"heads": 64, "d": 64, "dv": 64}, 8),
        ({"batch": 8, "q_rows": 8 * 5}, 32),
        ({"batch": 16, "q_rows": 16 * 5}, 32),
        ({"batch": 16, "q_rows": 16 * 9}, 8),
    ):
        chosen = plan(**few | options)
        assert chosen["row"]["design"] == "packed_heads"
        assert chosen["decode"]["packed_rows"] == of_decode
    chosen = plan(**few | {"heads": 64, "d": 64, "dv": 64})
    assert chosen["row"]["block_m"] == 192
    assert plan(**few | {"q_rows": 2048 + 63})["queries"] == {
        "block": 32,
        "tiles": 2111 // 32 + 66,
        "blocks": 131 * 8,
    }
    for options in (
        {"q_rows": 64 * 97},
        {"batch": 4, "q_rows": 4 * 32},  # one wave of single heads
        {"batch": 1, "q_rows": 16},
        {"batch_invariant": True},
        {"heads": 8},
        {"batch": 0},
        {"operands": ("ranges",)},
    ):
        assert plan(**few | options)["row"]["design"] == "tiles"
    assert plan(**few, batch_invariant=True)["decode"]["packed_rows"] == 8
    assert plan(**few | {"batch": 1, "q_rows": 16})["decode"]["packed_rows"] == 64


@pytest.mark.parametrize("group", [2, 8, 64])
@pytest.mark.parametrize("d", [64, 128, 512])
def test_the_schedule_of_packed_sequences_stays_within_its_bound(group, d):
    """Tiles count tokens, so that those of many heads are many."""
    few = {"varlen": True, "batch": 300, "q_rows": 1500, "heads": 2 * group, "kv_heads": 2, "d": d, "dv": d}
    for is_paged in (True, False):  # over contiguous keys decode has no workspace beside it
        chosen = plan(**few, right=0, paged=is_paged)
        tokens = chosen["row"]["block_m"] // group
        assert (chosen["row"]["design"], chosen["queries"]["block"]) == ("packed_heads", tokens)
        assert chosen["queries"]["tiles"] >= (1500 - 302) // tokens + 302
        assert chosen["workspace"] <= chosen["workspace_bound"]


@pytest.mark.parametrize(
    "options", [{}, {"num_splits": 4}, {"batch_invariant": True}, {"device": A100}], ids=str
)
@pytest.mark.parametrize("batch", [1, 8, 16, 100])
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 40])
def test_decode_of_packed_sequences_of_average_length_stays_within_its_bound(tokens, batch, options):
    for q_rows in (tokens * batch, tokens * batch - batch // 2):
        chosen = plan(varlen=True, batch=batch, q_rows=q_rows, right=0, **options)
        assert chosen["workspace"] <= chosen["workspace_bound"]


def test_packed_sequences_of_contiguous_keys():
    call = {"varlen": True, "paged": False, "batch": 64, "k_rows": 64 * 8192, "right": 0}
    assert plan(**call, q_rows=16 * 64)["row"]["design"] == "packed_heads"
    assert plan(**call, q_rows=17 * 64)["row"]["design"] == "tiles"
    assert plan(**call, q_rows=16 * 64, heads=8)["row"]["design"] == "tiles"


def test_heads_are_packed_where_that_makes_fewer_tiles():
    """112 tokens of four heads fill four tiles either way, and of eight heads seven or eight."""
    for options in ({}, {"operands": ("alibi_slopes",)}, {"varlen": True}):
        sizes = [(32, 128, 96, 112), (64, 128, 112, 113), (32, 512, 48, 64)]
        if not options:  # of one head, instead of decode
            sizes.append((8, 128, 64, 65))
        for heads, d, few, many in sizes:
            rows = [64 * x if "varlen" in options else x for x in (few, many)]
            chosen = [
                plan(q_rows=x, right=0, heads=heads, d=d, dv=d, **options)["row"]["design"] for x in rows
            ]
            assert chosen == ["packed_heads", "cluster_columns" if d == 512 else "tiles"]


def test_packed_heads_fill_the_sms_with_slices_of_values():
    """64 query heads over one KV head of 512: decode would read each key eight times."""
    options = {"d": 512, "dv": 512, "q_rows": 1, "heads": 64, "kv_heads": 1}
    for pages in ({"page_size": 64}, {"paged": False}):
        chosen = plan(batch=64, **options | pages)
        assert (chosen["row"]["design"], chosen["persistent_ctas"]) == ("packed_heads", 128)
        # Tiles that leave half of the SMs idle still take less time; those of eight sequences do not.
        half = plan(batch=32, **options | pages)
        assert (half["row"]["design"], half["persistent_ctas"]) == ("packed_heads", 64)
        assert plan(batch=8, **options | pages)["row"]["pass"] == "decode"


def test_tiles_leave_sms_idle_where_decode_would_read_keys_many_times():
    """A batch of 6 has 48 tiles for 132 SMs. float8 keys are read in less time, and tiles widen them."""
    float8 = {"heads": 128, "float8": True}
    for few, more in (
        ({"batch": 4, "q_rows": 16}, {"batch": 6, "q_rows": 16}),
        ({"batch": 4, "q_rows": 8, "heads": 64}, {"batch": 6, "q_rows": 8, "heads": 64, "paged": False}),
        ({"batch": 4, "q_rows": 8, **float8}, {"batch": 4, "q_rows": 16, **float8}),
    ):
        assert plan(right=0, **few)["row"]["pass"] == "decode"
        assert plan(right=0, **more)["row"]["design"] == "packed_heads"


@pytest.mark.parametrize(
    ("batch", "q_rows", "design", "block"),
    [
        (64, 64, "packed_heads", 192),
        (16, 64, "packed_heads", 192),
        (8, 64, "packed_heads", 128),  # 256 tiles: two waves of either height
        (8, 17, "packed_heads", 128),
        (4, 64, "packed_heads", 128),  # one wave
        (8, 128, "packed_heads", 192),  # three waves, where single heads have four
        (4, 128, "tiles", 192),  # two waves of either design
    ],
)
def test_tiles_of_two_or_three_consumers_whose_waves_take_less_time(batch, q_rows, design, block):
    chosen = plan(heads=64, d=64, dv=64, batch=batch, q_rows=q_rows, right=0)["row"]
    assert (chosen["design"], chosen["block_m"]) == (design, block)


def test_single_heads_run_where_packed_heads_take_as_long():
    """Packed heads' kernel of an option is slower."""
    for options in ({}, {"softcap": 30.0}):
        for batch, q_rows, design in ((4, 64, "tiles"), (4, 128, "tiles"), (8, 64, "packed_heads")):
            chosen = plan(batch=batch, q_rows=q_rows, heads=32, right=0, **options)["row"]
            assert chosen["design"] == design


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 4},  # too few tiles: the keys have to be split
        {"leading": 2},
        {"left": 100, "align": "top_left"},
        {"num_splits": 2},
        {"batch_invariant": True},
        {"page_size": 12},
        {"dtype": "float32"},
        {"operands": ("ranges",)},
        {"operands": ("window_left",)},
    ],
    ids=str,
)
def test_what_the_packed_forward_lacks_decodes(options):
    """Calls that the forward with packed heads does not support, or would leave SMs idle in, run decode."""
    assert plan(q_rows=16, **options)["row"]["pass"] == "decode"


def test_rows_of_a_group_that_tiles_do_not_hold_whole_decode():
    """A query tile of the packed forward must hold all query heads of a token, and here 64 is no multiple of these."""
    assert plan(q_rows=8, heads=48)["row"]["pass"] == "decode"  # six query heads per KV head
    nine = plan(q_rows=32, heads=72)["row"]
    assert (nine["pass"], nine["design"], nine["block_m"]) == ("forward", "tiles", 128)
