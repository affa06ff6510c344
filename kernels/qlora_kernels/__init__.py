"""Provides kernels for QLoRA fine-tuning. It imports torch, and triton only when that runs; never qlora_sft."""
