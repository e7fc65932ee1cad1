"""Reads a Hugging Face checkpoint, a folder with config.json and *.safetensors, into a model of this folder.

The safetensors format is a JSON header, which names dtype, shape and place of each tensor, and the tensors' bytes. They
are mapped into memory and copied one at a time.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from .decoder import CausalLM

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class CheckpointError(ValueError):
    """A folder that is no checkpoint of a model of this folder."""


def read_config(path: Path) -> dict[str, Any]:
    """The fields of config.json; those of the text model, if the checkpoint has others besides."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no config.json; name the folder of a Hugging Face checkpoint"
        ) from None
    return {**config, **config.get("text_config", {})}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, mapped into memory."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not (path / name).exists()]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return {name: tensor for file in names for name, tensor in read_safetensors(path / file)}


def read_safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of a file: 8 bytes of header length, the header, then the data that its offsets count in."""
    data = np.memmap(file, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def tensor_names(model: CausalLM) -> dict[tuple[str | int, ...], str]:
    """The checkpoint's name of every weight: its path, with Flax's own names for weights replaced."""
    renamed = {"kernel": "weight", "embedding": "weight"}
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    return {path: ".".join(str(renamed.get(part, part)) for part in path) for path in paths}


def as_stored(path: tuple[str | int, ...], array: Any) -> Any:
    """A weight as the checkpoint has it, or the other way round: Flax's kernels [in, out] are stored [out, in]."""
    return array.T if path[-1] == "kernel" else array


def load_weights(model: CausalLM, tensors: Mapping[str, np.ndarray]) -> CausalLM:
    """The model, abstract or not, with the weights of a checkpoint.

    Raises CheckpointError if a tensor is missing, has another shape, or is one that the model does not know.
    """
    tensors = dict(model.convert(tensors))
    graph, state = nnx.split(model)
    names, loaded = tensor_names(model), []
    if missing := sorted(set(names.values()) - set(tensors)):
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors, {missing[0]} among them")
    for path, variable in nnx.to_flat_state(state):
        stored = tensors.pop(names[path])
        wanted = variable.shape[::-1] if path[-1] == "kernel" else variable.shape
        if stored.shape != wanted:
            raise CheckpointError(f"{names[path]} has shape {wanted}; the checkpoint's is {stored.shape}")
        loaded.append((path, variable.replace(jnp.asarray(as_stored(path, stored), variable.dtype))))
    known = re.compile("|".join(map(re.escape, (*model.unread, "lm_head."))))
    if unknown := sorted(name for name in tensors if not known.match(name)):
        raise CheckpointError(
            f"the model does not know {len(unknown)} of the tensors, {unknown[0]} among them"
        )
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def load(path: str | Path, models: Mapping[str, type[CausalLM]], **changes: Any) -> CausalLM:
    """The model of a checkpoint; raises CheckpointError if it is none of `models`, which are by `model_type`.

    Args:
      changes: fields of the configuration to change, such as `dtype="bfloat16"`.
    """
    config = read_config(Path(path))
    kind = config.get("model_type")
    if kind not in models:
        raise CheckpointError(
            f"{path} has model_type {kind!r}; the examples have {', '.join(sorted(models))}"
        )
    model = models[kind]
    abstract = nnx.eval_shape(lambda: model(model.config_type.from_json(config, **changes), rngs=nnx.Rngs(0)))
    return load_weights(abstract, read_tensors(Path(path)))
