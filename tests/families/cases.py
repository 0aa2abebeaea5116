"""The families that the common tests are run for."""

from tests.families import (
    tiny_chroma,
    tiny_flux2,
    tiny_flux2_dev,
    tiny_krea2,
    tiny_qwen_image,
    tiny_sd3,
    tiny_wan,
    tiny_z_image,
)
from tests.families.case import Case

CASES: dict[str, Case] = {
    "chroma": tiny_chroma.CASE,
    "flux2_klein": tiny_flux2.CASE,
    "flux2_dev": tiny_flux2_dev.CASE,
    "krea2": tiny_krea2.CASE,
    "qwen_image": tiny_qwen_image.CASE,
    "sd3": tiny_sd3.CASE,
    "wan": tiny_wan.CASE,
    "z_image": tiny_z_image.CASE,
}
