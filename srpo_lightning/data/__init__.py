"""Prompts in, conditions out."""

from srpo_lightning.data.datamodule import PromptData as PromptData
from srpo_lightning.data.prompts import Source as Source
