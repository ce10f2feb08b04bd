"""How many words of a picture's caption a projector finds in an encoder's tokens, before any language model reads them.

    python benchmarks/words_in_tokens.py TOWER... [--samples 4000] [--num-names 30] [--resolution 64] [--seed 0]

TOWER is a model that `ov3 vlm train` takes, such as the arms of `ov3 reproduce`: RUNS/unified-seed0/model beside
RUNS/reconstruction-seed0/model. Each gets the recipe `demo`'s first alignment of a new projector (docs/VLM.md, "Words
first") on the captions of the same scenes, and stands in one row: of pictures held out, the part of their words among
as many first guesses, and the loss in nats a word. Prints Markdown. A minute a tower on one core.
"""

import argparse
from dataclasses import replace

import torch

from openvision3.vlm import recipes
from openvision3.vlm.data import open_conversations
from openvision3.vlm.train import build
from openvision3.vlm.words import align, captioned, encoded


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("towers", nargs="+")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--num-names", type=int, default=30)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe, device = recipes.demo(), torch.device("cpu")
    data = replace(recipe.stage1.data, scenes=replace(recipe.stage1.data.scenes, num_names=options.num_names))
    words = replace(recipe.words, samples=options.samples)
    print("| tower | words | found | nats a word |\n|---|---|---|---|")
    for tower in options.towers:
        config = replace(recipe, tower=tower, resolution=options.resolution, seed=options.seed)
        vlm, side = build(config)
        conversations = open_conversations(data, side, options.seed, options.samples)
        tokens, said = encoded(vlm, captioned(conversations, options.samples), device, lambda count: None)
        found = align(vlm, tokens, said, words, options.seed, device, lambda step, figures: None)
        print(f"| {tower} | {found['words']:.0f} | {found['recall']:.3f} | {found['held_out_loss']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
