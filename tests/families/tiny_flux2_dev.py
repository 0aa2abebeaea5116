"""FLUX.2-dev in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.processors import TemplateProcessing
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, TokenizersBackend

from srpo_lightning.policies import Flux2Policy
from tests.families import qwen
from tests.families.case import Case
from tests.families.tiny_flux2 import MISTAKES, latents, scheduler, transformer, vae

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
)


def tokenizer(max_tokens: int) -> TokenizersBackend:
    """As a PixtralProcessor's: texts and conversations alike begin with a token of their own."""
    end, start, _ = qwen.SPECIAL
    backend = qwen.tokenizer(max_tokens, SYSTEM_MESSAGE, "system user").backend_tokenizer
    special = [(start, backend.token_to_id(start))]
    backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=special)
    return TokenizersBackend(
        tokenizer_object=backend, bos_token=start, pad_token=end, model_max_length=max_tokens, chat_template=CHAT
    )


def mistral3(num_tokens: int) -> Mistral3ForConditionalGeneration:
    text = qwen.LANGUAGE | {"vocab_size": num_tokens, "num_hidden_layers": 30, "model_type": "mistral"}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return qwen.noisy(Mistral3ForConditionalGeneration(config))


def write(folder: Path, **changes: Any) -> Path:
    """A pipeline for 16 x 16 pictures and up, its tokenizer outside a processor; `changes` are of the transformer."""
    torch.manual_seed(0)
    own = tokenizer(48)
    Flux2Pipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=mistral3(len(own)),
        tokenizer=own,
        transformer=transformer(**{"guidance_embeds": True} | changes),
    ).save_pretrained(folder)
    return folder


class WithoutGuidance(Flux2Policy):
    def network(self, x, sigma, text, size, told):
        return super().network(x, sigma, text, size, [told[0], torch.ones_like(told[1])])


CASE = Case(
    Flux2Policy,
    write,
    MISTAKES | {"guidance": WithoutGuidance},
    guidances=(1.0, 4.0),
    refused={"exact_conditioning": (True, "false"), "trained_guidance": ("detached", "conditional")},
    latents=latents,
)
