"""`cache`: encode the prompts and pictures of a configuration, on all devices, before it is trained."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import PositiveInt
from torch.multiprocessing.spawn import spawn
from tqdm.auto import tqdm

from srpo_lightning.config.arguments import new_data, new_policy, read_config
from srpo_lightning.data import PromptData
from srpo_lightning.data.images import LatentCache, at_once, encoded, latent_key
from srpo_lightning.data.preparation import lengths, with_negative
from srpo_lightning.data.store import ParquetStore, in_groups, per_file, writing
from srpo_lightning.data.tensor_files import Item, key_of
from srpo_lightning.encoding import ImageEncoder, TextEncoder
from srpo_lightning.training.devices import chosen_device

MEGABYTE = 10**6

Wanted = Sequence[tuple[str, Any]]


class Work(NamedTuple):
    """Items to encode into one store.

    Args:
        what: Name of the items, for people.
        store: Store that keeps them.
        encoder: Encoder of texts or of pictures; each process has its own copy, on its own device.
        encode: Function of such an encoder and values, which gives their features.
        groups: Groups of keys and values, each of which becomes a file.
        item_bytes: Bytes of one item before compression.
        batch_size: Number of items encoded at once.
    """

    what: str
    store: ParquetStore
    encoder: TextEncoder | ImageEncoder
    encode: Callable[[Any, list[Any]], list[Item]]
    groups: list[Wanted]
    item_bytes: int
    batch_size: int

    @property
    def num_items(self) -> int:
        """Items in all groups."""
        return sum(len(group) for group in self.groups)


def cache(
    config: list[str], num_processes: PositiveInt | None = None, device: str = "auto", prune: bool = False
) -> None:
    """Encode all prompts and pictures of a configuration that are not encoded yet; after a kill it goes on.

    Args:
        config: Configuration files and settings that `fit` will get; each changes what those before it say.
        num_processes: Number of processes that encode; null means one for each GPU, or one without any.
        device: Device that encodes: auto, cuda or cpu; auto takes a GPU if there is one.
        prune: Whether to delete files that hold no prompt or picture of this configuration.

    Raises:
        ValueError: naming the cure, if a source or a model cannot be read, or the cache is a remote one.
    """
    kind = chosen_device(device)
    data = read_data(*config)
    if data.cache.remote:
        raise ValueError(
            f"data.cache_dir is {data.cache.parent}, from where features are only read: encode into a folder here, and "
            "upload that"
        )
    num_gpus = torch.cuda.device_count() if kind == "cuda" else 0
    processes = num_processes or num_gpus or 1
    if num_gpus and processes > num_gpus:
        raise ValueError(f"num_processes is {processes}, and each needs a GPU of {num_gpus}: set it to that or less")
    for line in lengths(data.selection.texts, data.cache):
        print(line)
    texts = with_negative(data.selection.texts, data.cache.encoder.negative)
    for store, wanted, work in ((data.cache, *text_work(data, texts)), *image_work(data)):
        with writing(store.folder):
            todo = work(store.recover(wanted))
            estimate(todo, len(wanted), processes, kind)
            encode(todo, processes, kind)
            manifest = store.publish(keep=[key for key, _ in wanted] if prune else None)
        each = manifest.num_bytes // max(manifest.num_items, 1)
        print(
            f"{store.folder}: {manifest.num_items} {todo.what} in {len(manifest.files)} files, "
            f"{manifest.num_bytes / MEGABYTE:.1f} MB, {each} bytes each ({todo.item_bytes} before compression)"
        )


def read_data(*config: str) -> PromptData:
    """The data module of configuration files."""
    settings = read_config(*config)
    return new_data(settings, new_policy(settings))


def text_work(data: PromptData, texts: Sequence[str]) -> tuple[Wanted, Callable[[Wanted], Work]]:
    """What of the prompts is wanted, and what of it is to be done."""
    cache = data.cache

    def work(missing: Wanted) -> Work:
        groups = in_groups(missing, cache.items_per_file)
        return Work("prompts", cache, cache.encoder, encode_texts, groups, cache.item_bytes, data.text_batch_size)

    return [(key_of(text), text) for text in texts], work


def image_work(data: PromptData) -> Iterator[tuple[LatentCache, Wanted, Callable[[Wanted], Work]]]:
    """What is to be done for the pictures; files hold one size each."""
    if data.latents is None:
        return
    store, encoder = data.latents, data.image_encoder
    assert encoder is not None
    pictures = data.selection.pictures
    item_bytes = max(picture.latent_bytes for picture in pictures)

    def work(missing: Wanted) -> Work:
        groups = []
        for size in dict.fromkeys(picture.size for _, picture in missing):
            groups += in_groups([item for item in missing if item[1].size == size], per_file(item_bytes))
        batch_size = at_once(pictures, data.text_batch_size)
        return Work("pictures", store, encoder, encode_pictures, groups, item_bytes, batch_size)

    yield store, [(latent_key(picture), picture) for picture in pictures], work


def estimate(work: Work, wanted: int, processes: int, kind: str) -> None:
    """Say how large it will be at most, before it starts."""
    work.store.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work.store.folder).free
    print(
        f"{work.what}: {wanted - work.num_items} of {wanted} are there; {work.num_items} to encode in "
        f"{len(work.groups)} files on {processes} x {kind}, at most {work.num_items * work.item_bytes / MEGABYTE:.1f} "
        f"MB of {free / MEGABYTE:.0f} MB free; time and size follow after the first file",
        flush=True,
    )


def encode(work: Work, processes: int, kind: str) -> None:
    """Encode all groups, on one process each device, and show how it goes on."""
    if not work.groups:
        return
    start = time.perf_counter()
    done = written = 0
    with tqdm(total=work.num_items, desc=work.what, unit="") as bar:
        for count, num_bytes in _finished(work, min(processes, len(work.groups)), kind):
            if not done:
                each = num_bytes / count
                seconds = (time.perf_counter() - start) / (count * min(processes, len(work.groups)))
                bar.write(
                    f"{work.what}: {1 / seconds:.1f} per second and {each:.0f} bytes each: about "
                    f"{seconds * work.num_items / 60:.1f} minutes and {each * work.num_items / MEGABYTE:.1f} MB in all"
                )
            done += count
            written += num_bytes
            bar.update(count)


def _finished(work: Work, processes: int, kind: str) -> Iterator[tuple[int, int]]:
    """The items and bytes of each file, when it is on the disk."""
    if processes == 1:
        yield from _files(work, 0, 1, kind)
        return
    queue: Any = get_context("spawn").SimpleQueue()
    running = spawn(_process, (work, processes, kind, queue), processes, join=False)
    assert running is not None
    left = len(work.groups)
    while left:
        while queue.empty():
            running.join(timeout=0.1)  # raises what a process has raised
        yield queue.get()
        left -= 1
    while not running.join():
        pass


def _process(rank: int, work: Work, processes: int, kind: str, queue: Any) -> None:
    for finished in _files(work, rank, processes, kind):
        queue.put(finished)


def _files(work: Work, rank: int, processes: int, kind: str) -> Iterator[tuple[int, int]]:
    encoder = work.encoder
    encoder.device = f"cuda:{rank}" if kind == "cuda" else kind
    for group in work.groups[rank::processes]:
        file = work.store.write(group, partial(work.encode, encoder), work.batch_size)
        yield len(file.keys), file.num_bytes
    encoder.unload()


def encode_texts(encoder: TextEncoder, texts: list[str]) -> list[Item]:
    """Features of prompts, as they are stored."""
    return list(encoder.encode(texts))


def encode_pictures(encoder: ImageEncoder, pictures: list[Any]) -> list[Item]:
    """Latents of pictures, as they are stored."""
    return encoded(pictures, encoder.encode)
