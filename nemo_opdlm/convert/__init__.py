"""Weights, settings and tokenizers of other formats <-> Megatron-core tensors; needs neither Megatron nor NeMo."""
