"""The vision encoder for transformers as files that stand alone.

`save_pretrained` copies them beside the weights, so that `trust_remote_code=True` loads such a folder where openvision3
is not installed: they import nothing of it.
"""
