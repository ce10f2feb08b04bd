"""One process of `openvision3.vlm.train`, started by torchrun or alone: CONFIG.json [KILL_AFTER_STEP]."""

import json
import os
import signal
import sys

import openvision3.vlm.train as training
from openvision3.config import from_dict
from openvision3.training.run_folder import RunInterrupted
from openvision3.vlm.config import VLMTrainConfig


def main() -> None:
    """Trains; prints for each batch of this process whether it had a picture of its own."""
    with open(sys.argv[1]) as file:
        config = from_dict(VLMTrainConfig, json.load(file))
    kill_after = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    plain, calls = training.loss_sum, [0]

    def watched(model, batch):
        own = (batch["attention_mask"].bool() & (batch["input_ids"] == model_image_id(model))).any()
        print(f"rank {os.environ.get('RANK', '0')} pictures {bool(own)}", flush=True)
        calls[0] += 1
        if calls[0] == kill_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, batch)

    training.loss_sum = watched
    try:
        training.train(config, "cpu")
    except RunInterrupted as stop:
        print(stop)


def model_image_id(model):
    """Through whatever wraps it."""
    while not hasattr(model, "config"):
        model = model.module
    return model.config.image_token_id


if __name__ == "__main__":
    main()
