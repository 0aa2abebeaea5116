"""What is trained."""

from srpo_lightning.policies.adapters import Lora as Lora
from srpo_lightning.policies.base import Policy as Policy
from srpo_lightning.policies.flux import FluxPolicy as FluxPolicy
