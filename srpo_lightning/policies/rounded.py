"""Blocks in 4 bits, kept on the disk as they were rounded, from where the next start reads them."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from isal import isal_zlib
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load_file, save
from torch import nn

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.crc import crc32
from srpo_lightning.files.full_disk import FullDiskError
from srpo_lightning.training.nf4 import restore_in_4_bits, rounding_device


class RoundedBlocks:
    """A folder with a file per block, whose name ends in the CRC-32 of its content.

    Args:
        parent: Folder of all models' blocks; None keeps none.
        source: What the blocks are made of and how, in words; where they are rounded is added.
    """

    def __init__(self, parent: str | None, source: str) -> None:
        whole = f"{source} {version('bitsandbytes')} {rounding_device().type}"
        name = hashlib.sha256(whole.encode()).hexdigest()[:16]
        self.folder = None if parent is None else Path(parent).expanduser() / name

    def read(self, name: str, block: nn.Module) -> bool:
        """Give a block without memory what was kept of it; whether there was any, and whole."""
        for path in [] if self.folder is None else self.folder.glob(f"{name}.*.safetensors"):
            with path.open("rb") as stream:
                found = crc32(stream, path.stat().st_size)
            if path.name == _file_name(name, found):
                restore_in_4_bits(block, load_file(path))
                return True
            path.unlink(missing_ok=True)
            rank_zero_warn(f"{path} is damaged, and is made again")
        return False

    def keep(self, name: str, block: nn.Module) -> None:
        """Write a block that was rounded; where the disk has no room for it, nothing is kept from then on."""
        if self.folder is None:
            return
        if not self.folder.is_dir():
            rank_zero_info(f"blocks in 4 bits are kept in {self.folder} for the next start")
        content = save({own: tensor.contiguous() for own, tensor in block.state_dict().items()})
        try:
            with complete_or_absent(self.folder / _file_name(name, isal_zlib.crc32(content))) as partial:
                partial.write_bytes(content)
        except (FullDiskError, OSError) as error:
            rank_zero_warn(f"blocks in 4 bits are rounded again at the next start: {error}")
            self.folder = None


def _file_name(block: str, crc: int) -> str:
    return f"{block}.{crc:08x}.safetensors"
