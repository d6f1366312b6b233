"""Weights and tokenizers between Hugging Face folders and Megatron-core; needs neither Megatron nor NeMo."""
