"""One door to every model: the embedded one, a model folder, a folder in the released format, or a hub id."""

from pathlib import Path
from typing import Literal

import torch

from openvision3.config import OpenVisionError
from openvision3.hub.released import download, is_released_folder, load_released
from openvision3.model.external import ExternalEncoder
from openvision3.model.openvision3 import OpenVision3
from openvision3.vae import FrozenVAE, load_vae
from openvision3.vae_distilled import is_distilled, load_distilled_vae

DEMO_FOLDER = Path(__file__).parents[1] / "weights" / "demo"


def load(
    name_or_path: str | Path = "demo",
    vae: FrozenVAE | str | Path | None = "auto",
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
) -> OpenVision3:
    """Loads a model in eval mode: "demo", a folder, or a hub id such as "UCSC-VLAA/openvision3-vit-base-patch2-32".

    vae "auto": the model's own; None: latents in, tokens out; another one as `load_vae` takes it, or loaded; a fast
    front's folder: that encoder before the model's own VAE. device "auto": cuda, then mps, then cpu. dtype None: fp32.
    A model that reads another library's encoder loads that too. Raises `OpenVisionError` with one line where the model
    can't be had or is broken, or where a front was made for another VAE.
    """
    device = default_device() if device == "auto" else device
    if isinstance(vae, str | Path) and is_distilled(vae):
        model = load(name_or_path, "auto", "cpu", torch.float32)  # in which fingerprints are compared
        model.attach_vae(load_distilled_vae(Path(vae), model.vae))
        return model.to(device=device, dtype=dtype or torch.float32)
    own: FrozenVAE | Literal["auto"] | None = "auto"
    if vae != "auto":
        own = load_vae(str(vae), device, dtype or torch.float32) if isinstance(vae, str | Path) else vae
    folder = model_folder(str(name_or_path))
    if is_released_folder(folder):
        return load_released(folder, own, device, dtype)
    model = OpenVision3.load(folder, own, device, dtype)
    if model.config.external is not None and isinstance(model.encoder, ExternalEncoder):
        from openvision3.hub.encoders import load_external  # which builds on this module

        model.encoder.attach(load_external(model.config.external, device, dtype or torch.float32))
    return model


def default_device() -> torch.device:
    """cuda where there is one, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def model_folder(name: str) -> Path:
    """The folder that a name means: itself, the demo's, or a hub id's snapshot."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == "demo":
        if not DEMO_FOLDER.is_dir():
            raise OpenVisionError(
                "this copy of openvision3 embeds no demo model; `ov3 train demo` makes one: pass its folder RUN/model"
            )
        return DEMO_FOLDER
    if path.exists():
        raise OpenVisionError(f"{name} is a file; a model is a folder")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise OpenVisionError(f"{name} does not exist")
    return download(name)
