# SPDX-License-Identifier: Apache-2.0
"""Downloads, with local folders in place of the hub."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxunlearn.io import _hub, hf

huggingface_hub = pytest.importorskip("huggingface_hub")
EXTRA = {  # of a published model: other formats, code, and other copies of the weights
    "README.md": "",
    "consolidated.safetensors": "x",
    "consolidated-00001-of-00002.safetensors": "x",
    "params.json": "{}",
    "modeling_x.py": "raise SystemExit(3)",
    "pytorch_model-00001-of-00002.bin": "x",
    "model.fp16.safetensors": "x",
    "onnx/model.safetensors": "x",
    "original/tokenizer.model": "x",
    "added.gguf": "x",
}


class Hub:
    """Repositories in local folders; records the files that were fetched."""

    def __init__(self, place):
        self.place, self.fetched, self.lists = place, {}, True
        self.revisions = set()

    def list_repo_files(self, name, revision=None):
        if not self.lists:
            raise ConnectionError("no list")
        folder = self.place / name
        files = [file for file in folder.rglob("*") if file.is_file()]
        return [str(file.relative_to(folder)) for file in files]

    def snapshot_download(self, name, allow_patterns, revision=None):
        self.revisions.add(revision)
        source, target = self.place / name, self.place / "cache" / name
        if not source.is_dir():
            raise ConnectionError(f"no {name}")
        target.mkdir(parents=True, exist_ok=True)
        files = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
        filtered = huggingface_hub.utils.filter_repo_objects
        for file in filtered(files, allow_patterns=allow_patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, target / file)
            self.fetched.setdefault(name, set()).add(file)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    for name in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    return made


def publish(hub, tiny, name="owner/model", **save):
    """The tiny model with all that published repositories hold."""
    model, params = tiny
    folder = hub.place / name
    hf.save(model, params, folder, **save)
    for file, text in EXTRA.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def same(found, tiny):
    jax.tree.map(np.testing.assert_array_equal, found[1], tiny[1])


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("max_bytes", [10_000, 10**9])
def test_the_weights_are_fetched_once(hub, tiny, lists, max_bytes):
    hub.lists = lists
    folder = publish(hub, tiny, max_shard_bytes=max_bytes)
    wanted = {file.name for file in folder.glob("*.safetensors")} - set(EXTRA)
    same(hf.load("owner/model"), tiny)
    fetched = hub.fetched["owner/model"]
    assert {name for name in fetched if name.endswith(".safetensors")} == wanted
    assert not any(name.endswith((".py", ".bin", ".gguf", ".md")) for name in fetched)


def test_the_index_names_the_shards(hub, tiny):
    folder = publish(hub, tiny, max_shard_bytes=10_000)
    for file in folder.glob("model-*-of-*.safetensors"):
        file.rename(folder / file.name.replace("model-", "part-"))
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-0", "part-0"))
    (folder / "model-00001-of-00009.safetensors").write_text("of another save")
    same(hf.load("owner/model"), tiny)
    assert "model-00001-of-00009.safetensors" not in hub.fetched["owner/model"]


def test_a_single_file_of_another_name(hub, tiny):
    folder = publish(hub, tiny)
    (folder / "model.fp16.safetensors").unlink()
    (folder / "model.safetensors").rename(folder / "weights[1].safetensors")
    same(hf.load("owner/model"), tiny)


@pytest.mark.parametrize("lists", [True, False])
def test_a_repository_of_gguf_files(hub, tiny, mentions, lists):
    pytest.importorskip("gguf")
    hub.lists = lists
    folder = hub.place / "owner/files-GGUF"
    hf.save_gguf(*tiny, folder / "a-F32.gguf", scheme="f32")
    (folder / "mmproj-a.gguf").write_text("x")
    (folder / "config.json").write_text("{}")  # many such repositories have one
    if not lists:
        (folder / "config.json").unlink()
    same(hf.load("owner/files-GGUF"), tiny)
    if lists:
        assert hub.fetched["owner/files-GGUF"] == {"a-F32.gguf"}

    hub.fetched.clear()
    shutil.rmtree(hub.place / "cache")
    hf.save_gguf(*tiny, folder / "b-F16.gguf", scheme="f16")
    with pytest.raises(FileNotFoundError) as info:
        hf.load("owner/files-GGUF")
    mentions(info, "'a-F32.gguf', 'b-F16.gguf'", "owner/files-GGUF/a-F32.gguf")
    if lists:
        assert not hub.fetched
    same(hf.load("owner/files-GGUF/a-F32.gguf"), tiny)
    with pytest.raises(FileNotFoundError) as info:
        hf.load("owner/files-GGUF/c.gguf")
    mentions(info, "'c.gguf'", "owner/files-GGUF", "a-F32.gguf" if lists else "GGUF")


def test_an_adapter_and_its_base(hub, tiny):
    publish(hub, tiny, "owner/base")
    folder = hub.place / "owner/adapter"
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 1}
    settings |= {"lora_alpha": 2, "revision": "v2"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"A": np.ones((1, 32), np.float32), "B": np.ones((32, 1), np.float32)}
    import safetensors.numpy

    safetensors.numpy.save_file(
        {f"{module}.lora_{half}.weight": value for half, value in parts.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "optimizer.safetensors").write_text("x")
    _, params, _ = hf.load("owner/adapter")
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.fetched["owner/adapter"] == names
    assert hub.revisions == {None, "v2"}
    kernel, before = (
        p["blocks"]["attention"]["q"]["kernel"] for p in (params, tiny[1])
    )
    np.testing.assert_allclose(kernel[0], before[0] + 2, atol=1e-6)
    np.testing.assert_array_equal(kernel[1], before[1])


def test_the_hub_out_of_reach(hub, mentions):
    hub.lists = False
    with pytest.raises(OSError) as info:
        hf.load("owner/absent")
    mentions(info, "owner/absent", "ConnectionError", "local folder")


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        ("owner/model", True),
        ("owner/model/a.gguf", True),
        ("owner/model/Q4/a-00001-of-00002.gguf", True),
        ("owner/model/other", False),
        ("model", False),
        ("./owner/model", False),
        ("/owner/model", False),
        ("C:\\owner\\model", False),
    ],
)
def test_names_on_the_hub(path, valid):
    assert _hub.is_name(path) == valid
