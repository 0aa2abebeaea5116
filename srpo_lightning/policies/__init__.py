"""What is trained."""

from srpo_lightning.policies.base import Policy as Policy
from srpo_lightning.policies.flux import FluxPolicy as FluxPolicy
