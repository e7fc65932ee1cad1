"""MaxText: `AttentionOp` with `jax_flash.compat.maxtext.apply_attention` in place of its own.

Its tests are only in its repository: where a checkout is given (`--checkouts`), those that a CPU can run are run too.
The calls here use its AttentionOp, Attention and MLA, once with its attention and once with ours.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from maxtext.common.common_types import AttentionType
from maxtext.configs import pyconfig
from maxtext.layers.attention_op import AttentionOp

from jax_flash.compat.maxtext import apply_attention

from .common import Comparison, Library, replace

OLDER = "tests older than 0.2.5, which its own attention fails too"
EXPECTED = {
    "*test_dot_product_mask_respects_segment_boundaries": OLDER,
    "*test_dot_product_mask_uses_original_load_balanced_positions": OLDER,
    "*test_flash_attention_dispatch_on_non_tpu": OLDER,
    "*test_tpu_splash_selects_block_causal_masks": OLDER,
    "*LoadBalancedMaskTest::test_dot_product_*_mask_uses_segment_positions": OLDER,
    "*test_packed_attention_sequence_descriptor_uses_thd_metadata_with_legacy_fallback": OLDER,
    "*test_mla_indexer_loss_chunking_parity": OLDER,
    "*DeepSeekV4AttentionMaskingTest::test_generate_attention_mask_*": OLDER,
}
B, S, HQ, HK, D = 2, 32, 4, 2, 16
LIMITS = dict(sliding_window_size=5, chunk_attn_window_size=7)


def comparable(result: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """The normalised result, and its logsumexp where the call returned one."""
    out, largest, total = result
    return (out,) if total is None else (out / total, largest + jnp.log(total))


def beside_own(comparison: Comparison) -> Callable[..., Any]:
    """Replaces `AttentionOp.apply_attention`; its own, in plain JAX, is returned."""

    def call(self: AttentionOp, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        quiet = named | {"record_max_logits": False}
        if all(isinstance(x, jax.Array) for x in (query, key, value)) and self.attention_type in COMPARED:
            lse = named.get("model_mode", "train") != "train"

            def ours(*x: Any) -> Any:
                return comparable(apply_attention(self, *x, *rest, **quiet))[: 1 + lse]

            def theirs(
                *x: Any,
            ) -> Any:  # in float32, as its own scores and weights have 16 bits in 16-bit calls
                wide = (y.astype(jnp.float32) for y in x)
                return comparable(own(self, *wide, *rest, **quiet))[: 1 + lse]

            comparison.beside(ours, theirs)(query, key, value)
        return apply_attention(self, query, key, value, *rest, **named)

    def own(self: AttentionOp, *rest: Any, **named: Any) -> Any:
        given = signature.bind(self, *rest, **named).arguments
        return self.apply_attention_dot(**{x: y for x, y in given.items() if x in of_dot})

    signature = inspect.signature(AttentionOp.apply_attention)
    of_dot = inspect.signature(AttentionOp.apply_attention_dot).parameters.keys() - {"self"}
    replace(AttentionOp.apply_attention, call)
    return own


COMPARED = set(AttentionType)


def config(**changes: Any) -> Any:
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = dict(
        run_name="libraries", enable_checkpointing=False, per_device_batch_size=1.0, max_target_length=S,
        max_prefill_predict_length=S // 2, dtype="float32", weight_dtype="float32", matmul_precision="highest",
        base_emb_dim=64, base_num_query_heads=HQ, base_num_kv_heads=HK, head_dim=D, causal_block_size=4,
        skip_jax_distributed_system=True, log_config=False,
    )  # fmt: skip
    return pyconfig.initialize(["", str(base)], **(settings | changes))


def op(cfg: Any, kind: str, **changes: Any) -> AttentionOp:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape([1] * len(cfg.mesh_axes)), cfg.mesh_axes)
    settings = dict(
        config=cfg, mesh=mesh, attention_kernel="dot_product", max_target_length=S, num_query_heads=HQ,
        num_kv_heads=HK, attention_type=AttentionType(kind), dtype=jnp.float32, float32_qk_product=True,
        float32_logits=True, max_prefill_predict_length=S // 2,
    )  # fmt: skip
    return AttentionOp(**(settings | LIMITS | changes), rngs=nnx.Rngs(0))


def main() -> int:
    library = Library("maxtext", "maxtext", EXPECTED)
    comparison = Comparison()
    own = beside_own(comparison)
    cfg = config()
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    q, k, v = normal(B, S, HQ, D) / 4, normal(B, S, HK, D), normal(B, S, HK, D)
    ids = jnp.asarray(np.repeat([[1, 2, 3, -1], [1, 1, 2, 2]], [11, 10, 7, 4], axis=1), jnp.int32)
    images = jnp.zeros((B, S), bool).at[0, 4:9].set(True).at[1, 20:28].set(True)

    def same(module: AttentionOp, *call: Any, grads: bool = True, **named: Any) -> None:
        """The call's result, and its gradient, are those of MaxText's own attention."""
        before = comparison.made, comparison.close
        module(*call, **named)
        jax.effects_barrier()
        made, close = (a - b for a, b in zip((comparison.made, comparison.close), before))
        assert made
        assert made == close, f"{made - close} of {made} calls differ, {comparison.worst:.1f} tolerances"

    plain: dict[str, Any] = dict(decoder_segment_ids=None, inputs_positions=None, model_mode="train")
    for kind, documents in itertools.product(
        ("global", "local_sliding", "chunk", "mla", "full", "block_diffusion"), (None, ids)
    ):
        named = plain | {"decoder_segment_ids": documents}
        name = f"{kind} {'packed' if documents is not None else 'plain'}"
        library.case(name, partial(same, op(cfg, kind), q, k, v, **named))
    sinks = normal(HQ)
    library.case("sinks", partial(same, op(cfg, "local_sliding"), q, k, v, **plain, sinks=sinks))
    library.case("softcap", partial(same, op(cfg, "global", attn_logits_soft_cap=2.0), 8 * q, k, v, **plain))
    library.case("images", partial(same, op(cfg, "global"), q, k, v, **plain, bidirectional_mask=images))
    wide = normal(B, S, HQ, 24), normal(B, S, HQ, 24), normal(B, S, HQ, D)
    library.case("MLA's head dims", partial(same, op(cfg, "mla", num_kv_heads=HQ), *wide, **plain))
    kept = jnp.where(jnp.asarray(random.random((B, S, S)) < 0.7), 0.0, -1e38)
    library.case("indexer", partial(same, op(cfg, "mla"), q, k, v, **plain, indexer_mask=kept))

    def decode(kind: str) -> None:
        half = S // 2
        active = jnp.asarray(np.array([[1] * 9 + [0] * 7 + [1] * 3 + [0] * 13, [1] * 16 + [1] * 16]))
        caches = [
            (k[:, :half], v[:, :half], active[:, :half]),
            (k[:, half:], v[:, half:], active[:, half:], None),
        ]
        call = dict(plain, model_mode="autoregressive", cached_values=caches)
        same(op(cfg, kind), q[:, :1], None, None, **call)

    for kind in ("global", "local_sliding", "chunk", "mla"):
        library.case(f"decode {kind}", partial(decode, kind))

    def largest() -> None:
        for kind in ("global", "local_sliding"):
            module = op(cfg, kind, attn_logits_soft_cap=3.0)
            module(8 * q, k, v, **(plain | {"decoder_segment_ids": ids}), record_max_logits=True)
            ours = module.max_logits[...]
            own(
                module, 8 * q, k, v, ids, None, None, "train", record_max_logits=True, sinks=None,
                qk_product_einsum=jnp.einsum, wv_product_einsum=jnp.einsum,
            )  # fmt: skip
            np.testing.assert_allclose(ours, module.max_logits[...], rtol=1e-5)

    library.case("record_max_logits", largest)
    if "LIBRARY_CHECKOUT" in os.environ:
        folder = Path(os.environ["LIBRARY_CHECKOUT"])
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        library.pytest(folder / "tests" / "unit" / "attention_test.py")
    return library.report(comparison)


if __name__ == "__main__":
    sys.exit(main())
