"""What other implementations reached beside cuDNN in an earlier run, for those that cannot be installed here.

The tables hold TFLOP/s of the whole call in JAX 0.11.2 on one H200, bfloat16, means of two runs, timed as measure.py
says, in August 2026; the 8192³ product ran at 686 to 702 TFLOP/s. FA3: FlashAttention-3's sm_90a kernels behind XLA
FFI. fa4: fa4-jax 0.1.0. jla: jax-linear-attention 0.1.0, the better of its two backwards. fa3k: flash-attn3-jax 0.2.3.
They are copied from this project's notes for the people who write its kernels (KERNELS.md, "Peers to beat").

A peer's time over ours, by way of its ratio to cuDNN here and cuDNN's time in the run at hand, is a lead, not a
result: the two runs had different clocks, drivers and versions. Reports label it so.
"""

from __future__ import annotations

COLUMNS = ("cuDNN", "FA3", "fa4", "jla", "fa3k")

_FORWARD = """
d64 s1024                      | 381 354 373   - 283
d64 s1024 causal               | 284 283 224 269 221
d64 s4096                      | 428 472 486   - 314
d64 s4096 causal               | 378 440 362 397 257
d64 s16384                     | 440 518 532   - 322
d64 s16384 causal              | 420 505 428 455 266
d128 s1024                     | 491 557 510   - 504
d128 s1024 causal              | 338 437 346 382 388
d128 s4096                     | 574 637 607   - 579
d128 s4096 causal              | 459 609 512 531 519
d128 s16384                    | 595 662 658   - 605
d128 s16384 causal             | 525 661 586 579 560
d256 s1024                     | 507 598 561   -   -
d256 s1024 causal              | 363 442 391   -   -
d256 s4096                     | 613 683 675   -   -
d256 s4096 causal              | 498 630 588   -   -
d256 s16384                    | 641 718 715   -   -
d256 s16384 causal             | 553 700 686   -   -
64/8 heads d128 s16384 causal  | 555 659 597 585 569
2 × 32/8 d128 s8192 causal     | 524 638 570 574 555
2 × 16/2 d256 s8192 causal     | 576 683 661   -   -
2 × 64/8 d64 s8192 causal      | 415 489 415 455 276
2 × 64/8 d64 s8192 window 128  | 111   -  99 116 101
32/8 d128 s16384 window 4096   | 497   - 544 553 572
16/16 d128 s16384 window 1024  | 393   - 421 414 442
32/32 d64 s16384 window 1024   | 299   - 301 321 233
16/8 d256 s16384 window 1024   | 445   - 466   -   -
"""

_BACKWARD = """
d64 s1024                      | 313 399 401   - 250
d64 s1024 causal               | 213 290 308 267 188
d64 s4096                      | 403 490 487   - 307
d64 s4096 causal               | 343 449 442 396 278
d64 s16384                     | 434 514 512   - 330
d64 s16384 causal              | 402 523 513 449 308
d128 s1024                     | 365 441 459   - 441
d128 s1024 causal              | 258 337 342 302 333
d128 s4096                     | 488 545 565   - 554
d128 s4096 causal              | 408 509 506 450 495
d128 s16384                    | 521 578 611   - 597
d128 s16384 causal             | 496 583 589 522 571
d256 s1024                     | 271 367 260   -   -
d256 s1024 causal              | 215 288 223   -   -
d256 s4096                     | 354 427 291   -   -
d256 s4096 causal              | 321 403 282   -   -
d256 s16384                    | 348 448 300   -   -
d256 s16384 causal             | 365 452 302   -   -
64/8 heads d128 s16384 causal  | 497 564 574 465 568
2 × 32/8 d128 s8192 causal     | 457 540 542 443 537
2 × 16/2 d256 s8192 causal     | 360 428 292   -   -
2 × 64/8 d64 s8192 causal      | 376 489 484 386 291
2 × 64/8 d64 s8192 window 128  |  72   -  98 108  60
32/8 d128 s16384 window 4096   | 441   - 516 413 509
16/16 d128 s16384 window 1024  | 324   - 402 327 394
32/32 d64 s16384 window 1024   | 263   - 348 267 233
16/8 d256 s16384 window 1024   | 264   - 232   -   -
"""


def _read(table: str) -> dict[str, dict[str, float]]:
    """The name of a case (cases.py) → TFLOP/s by column, of those that ran it."""
    rows = {}
    for line in table.strip().splitlines():
        name, _, figures = line.partition("|")
        known = zip(COLUMNS, figures.split(), strict=True)
        rows[name.strip()] = {column: float(x) for column, x in known if x != "-"}
    return rows


RATES = {"forward": _read(_FORWARD), "backward": _read(_BACKWARD)}


def flash_attention_3(pass_: str, case: str) -> float | None:
    """FlashAttention-3's rate over cuDNN's; None where it was not timed."""
    rates = RATES[pass_].get(case, {})
    return rates["FA3"] / rates["cuDNN"] if "FA3" in rates else None


def best_peer(pass_: str, case: str) -> tuple[float, str] | None:
    """The highest rate of any peer over cuDNN's, and whose it is; None where the case was not timed."""
    rates = RATES[pass_].get(case)
    if not rates:
        return None
    name = max(rates, key=rates.__getitem__)
    return rates[name] / rates["cuDNN"], name
