"""Provide the embedded default: a real 135M base model and generated data, so that everything can be tried at once."""

from qlora_sft.demo.base_model import base_model_path
from qlora_sft.demo.conversations import data_path

__all__ = ["base_model_path", "data_path"]
