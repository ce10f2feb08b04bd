"""OpenVision 3 inside a language model: LLaVA-1.5 and LLaVA-NeXT on transformers' classes (docs/VLM.md)."""
