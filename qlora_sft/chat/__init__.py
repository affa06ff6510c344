"""Hold a conversation with a run, a model folder or a GGUF file."""

from qlora_sft.chat.terminal import chat

__all__ = ["chat"]
