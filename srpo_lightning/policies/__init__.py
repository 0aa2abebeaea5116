"""What is trained."""

from srpo_lightning.policies.adapters import Lora as Lora
from srpo_lightning.policies.auto import AutoPolicy as AutoPolicy
from srpo_lightning.policies.base import Policy as Policy
from srpo_lightning.policies.chroma import ChromaPolicy as ChromaPolicy
from srpo_lightning.policies.flux import FluxPolicy as FluxPolicy
from srpo_lightning.policies.flux2 import Flux2Policy as Flux2Policy
from srpo_lightning.policies.krea2 import Krea2Policy as Krea2Policy
from srpo_lightning.policies.qwen_image import QwenImagePolicy as QwenImagePolicy
from srpo_lightning.policies.sd3 import SD3Policy as SD3Policy
from srpo_lightning.policies.wan import WanPolicy as WanPolicy
from srpo_lightning.policies.z_image import ZImagePolicy as ZImagePolicy
