# SPDX-License-Identifier: Apache-2.0
"""Model families, one file each. Not part of the installed library, which never imports them by itself."""

FAMILIES = {
    "bert": "models.bert",
    "distilbert": "models.bert",
    "gpt2": "models.gpt2",
    "llama": "models.llama",
    "mistral": "models.llama",
    "mixtral": "models.mixtral",
    "qwen2": "models.llama",
    "qwen2_moe": "models.mixtral",
    "qwen3": "models.llama",
    "qwen3_moe": "models.mixtral",
    "smollm3": "models.llama",
    "t5": "models.t5",
    "mt5": "models.t5",
    "whisper": "models.whisper",
    "bart": "models.bart",
    "marian": "models.bart",
    "mbart": "models.bart",
    "pegasus": "models.bart",
    "opt": "models.opt",
    "rnn": "models.rnn",
    "vision-encoder-decoder": "models.image_text",
    "vit": "models.vit",
}
"""The module of each `model_type` of Hugging Face that is done here."""
