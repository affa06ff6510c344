"""Kernels for QLoRA fine-tuning. Imports torch (and, later, triton); never qlora_sft."""
