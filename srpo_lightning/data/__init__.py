"""Prompts in, conditions out."""

from srpo_lightning.data.datamodule import PromptData as PromptData
