"""A vision encoder's folder where openvision3 is not installed: `trust_remote_code=True` in a process that lacks it."""

import os
import subprocess
import sys

import hf_models
import torch
from safetensors.torch import load_file, save_file

import openvision3.hub.hf as hf

SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("openvision3", "diffusers", "einops"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import openvision3
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("openvision3 is not blocked")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, pipeline

folder, pixels_file, picture = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "OpenVision3VisionModel" and type(model).__module__.startswith("transformers_modules")
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    output = model(load_file(pixels_file)["pixels"], output_hidden_states=True)
    real = model(**processor(Image.open(picture), return_tensors="pt"))
features = pipeline("image-feature-extraction", model=model, image_processor=processor)(Image.open(picture))
assert torch.equal(torch.tensor(features), real.last_hidden_state)
model.save_pretrained(folder + "-again")
again = AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
save_file({"tokens": output.last_hidden_state.clone(), "last": output.hidden_states[-1].clone(),
           "pooled": output.pooler_output, "real": real.last_hidden_state}, pixels_file)
"""


def test_it_works_without_openvision3(tmp_path):
    ours, pixels = hf_models.whole_model(), hf_models.images()
    folder, exchanged, picture = tmp_path / "encoder", tmp_path / "pixels.safetensors", tmp_path / "picture.png"
    hf.save_transformers(ours, folder, vision_only=True)
    names = {path.name for path in folder.iterdir()}
    assert {"modeling_openvision3.py", "configuration_openvision3.py", "image_processing_openvision3.py"} <= names
    save_file({"pixels": pixels}, exchanged)
    hf_models.picture().save(picture)
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(exchanged), str(picture)],
        cwd=tmp_path,
        env=os.environ
        | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    there = load_file(exchanged)
    with torch.no_grad():
        tokens = ours.encode(pixels)
        real = ours.encode(hf_models.ov3.preprocess(hf_models.picture(), 32)[None])
    torch.testing.assert_close(there["tokens"], tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(there["last"], tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(there["pooled"], ours.pool(tokens, normalize=False), atol=1e-5, rtol=0)
    torch.testing.assert_close(there["real"], real, atol=1e-4, rtol=0)
