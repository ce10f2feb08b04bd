from transformers import AutoModelForCausalLM, AutoTokenizer


def open_language_model(name, dtype):
    if name == "smollm2-135m-instruct":
        name = "/root/ov3-runs/s7/lm"
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
