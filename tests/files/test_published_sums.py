"""A file that a download tells the sum of is compared with it, once, and before anything is read from it."""

import hashlib
import os
import shutil

import pytest

from srpo_lightning.files import published_sums
from srpo_lightning.files.published_sums import check_sum, published_sum
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where sums are remembered, here of small files too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(published_sums, "SMALL_BYTES", 0)
    return tmp_path / "cache" / "srpo_lightning" / "sums"


def in_hub_cache(folder, content, name="model.safetensors"):
    """A file as the hub's cache holds it: a link to a blob that is called by its sum."""
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link = folder / "snapshots" / "0123" / name
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link, blob


def in_local_dir(folder, content, name="vae/model.safetensors"):
    """A file as `hf download --local-dir` leaves it."""
    path, noted = folder / name, folder / ".cache/huggingface/download" / f"{name}.metadata"
    for own in (path, noted):
        own.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    noted.write_text(f"0123\n{hashlib.sha256(content).hexdigest()}\n1700000000.0\n")
    return path, path


@pytest.mark.parametrize("download", [in_hub_cache, in_local_dir])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: bytes([content[0] ^ 1]) + content[1:]]
)
def test_a_file_that_is_not_what_was_published_is_refused_with_the_cure(tmp_path, download, damage):
    path, content = download(tmp_path / "model", b"weights")
    check_sum(path)
    content.write_bytes(damage(b"weights"))
    with pytest.raises(ValueError, match=rf"{path} is not what was published: .*; delete {content} and download it"):
        check_sum(path)


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path, monkeypatch, cache):
    path, blob = in_hub_cache(tmp_path / "model", b"weights")
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: hashed.append(stream.name) or digest(stream, name))
    check_sum(path)
    check_sum(path)
    assert hashed == [str(path)]
    os.utime(blob, ns=(1, 1))
    check_sum(path)
    assert hashed == [str(path)] * 2
    shutil.rmtree(cache)
    cache.parent.joinpath("sums").write_text("no folder")  # as where nothing can be written
    check_sum(path)
    assert hashed == [str(path)] * 3


def test_only_the_first_rank_of_a_node_reads_it(tmp_path, monkeypatch):
    path, blob = in_hub_cache(tmp_path / "model", b"weights")
    blob.write_bytes(b"damaged")
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_sum(path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="is not what was published"):
        check_sum(path)


def test_what_carries_no_sha_256_is_trusted(tmp_path):
    path, _ = in_local_dir(tmp_path / "model", b"{}", "config.json")
    noted = tmp_path / "model/.cache/huggingface/download/config.json.metadata"
    for content in ("", "0123", f"0123\n{hashlib.sha1(b'').hexdigest()}\n1.0\n"):
        noted.write_text(content)
        assert published_sum(path) is None
    noted.unlink()
    assert published_sum(path) is None
    check_sum(path)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_models_weights_are_compared_before_they_are_read(models, tmp_path, name):
    """One bit, which safetensors does not notice."""
    folder = shutil.copytree(models.pipeline, tmp_path / "flux")
    own = models._replace(pipeline=folder)
    path = folder / name / "diffusion_pytorch_model.safetensors"
    in_local_dir(folder, path.read_bytes(), f"{name}/{path.name}")
    tiny.new_policy(own)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not what was published"):
        tiny.new_policy(own)


def test_a_rewards_weights_are_compared(models, tmp_path):
    folder = shutil.copytree(models.clip, tmp_path / "clip")
    path = folder / "model.safetensors"
    in_local_dir(folder, path.read_bytes(), path.name)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{path} is not what was published"):
        tiny.new_reward(folder)
