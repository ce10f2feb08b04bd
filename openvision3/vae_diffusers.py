"""Any autoencoder of diffusers as a frozen VAE, from a folder or a hub id; FLUX.1's first.

Latent conventions (a trap): diffusers uses FLUX.1's latents as `(z - 0.1159) * 0.3611`, while OpenVision 3's released
weights were trained on `z * 0.3611`. The convention is a pair of fields of `VAEConfig`, never read from the autoencoder
at run time. TAEF1, the small stand-in for FLUX.1's VAE, gives `(z - 0.1159) * 0.3611` already: see `taef1_config`.
"""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from openvision3.config import OpenVisionError, VAEConfig
from openvision3.vae import FrozenVAE
from openvision3.vae_fast import FastAutoencoder, fast_autoencoder

FLUX_SCALE = 0.3611
FLUX_SHIFT = 0.1159
FLUX_SOURCE = "black-forest-labs/FLUX.1-schnell"
# Of vae/diffusion_pytorch_model.safetensors: the same file in FLUX.1-schnell (Apache-2.0) and FLUX.1-dev.
FLUX_SHA256 = "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3"
FLUX_LICENCE = "Apache-2.0 (as part of FLUX.1-schnell; FLUX.1-dev, which has the same file, is non-commercial)"

# The vae/config.json of FLUX.1-schnell and FLUX.1-dev, as far as it decides shapes (its numbers of channels and blocks
# are also in black-forest-labs/flux, src/flux/util.py: ch 128, ch_mult 1 2 4 4, num_res_blocks 2, z_channels 16).
FLUX_ARCHITECTURE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_HUB_FILES = [f"{folder}{name}" for folder in ("", "vae/") for name in (_CONFIG, f"{_WEIGHTS}*.safetensors*")]


def flux_config(convention: str = "released", source: str = FLUX_SOURCE) -> VAEConfig:
    """FLUX.1's VAE (16 channels, 8x) with the latent convention of OpenVision 3's "released" weights or of "diffusers".

    source: a hub id, or a folder with `config.json` and the weights, itself or in its subfolder `vae`. The weights'
    sha256 is checked. Raises `OpenVisionError` for another convention.
    """
    if convention not in ("released", "diffusers"):
        raise OpenVisionError(f"unknown latent convention {convention!r}: it is 'released' or 'diffusers'")
    shift = 0.0 if convention == "released" else FLUX_SHIFT
    return VAEConfig("diffusers", source, 16, 8, FLUX_SCALE, shift, FLUX_SHA256, FLUX_LICENCE)


def flux_autoencoder() -> Any:
    """diffusers' AutoencoderKL of FLUX.1's size with random weights, to count and time."""
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.AutoencoderKL(**FLUX_ARCHITECTURE)


def random_flux_vae() -> "DiffusersVAE":
    """A VAE of FLUX.1's size with random weights."""
    return DiffusersVAE(flux_config(), flux_autoencoder())


def flux_shell() -> "DiffusersVAE":
    """The same without weights, on the meta device: for counting."""
    with torch.device("meta"):
        return random_flux_vae()


def taef1_config(convention: str = "released", source: str = "madebyollin/taef1") -> VAEConfig:
    """TAEF1 (a 2.5 M parameter approximation of FLUX.1's VAE) in the same two conventions as `flux_config`.

    Its latents are already `(z - 0.1159) * 0.3611`, so that the released convention adds 0.1159 * 0.3611 to them.
    """
    if convention not in ("released", "diffusers"):
        raise OpenVisionError(f"unknown latent convention {convention!r}: it is 'released' or 'diffusers'")
    shift = -FLUX_SHIFT * FLUX_SCALE if convention == "released" else 0.0
    return VAEConfig("diffusers", source, 16, 8, 1.0, shift, "", "MIT")


def read_config(source: str) -> VAEConfig:
    """The config of the autoencoder at `source` (folder or hub id), with the convention that diffusers states for it.

    Channels and factor come from its `config.json`, as do `scaling_factor` and `shift_factor` (an absent or null shift
    is 0); the sha256 is the weights file's. Raises `OpenVisionError` where the source holds no autoencoder.
    """
    licence = FLUX_LICENCE if source == FLUX_SOURCE else ""
    folder = _folder(source, licence)
    vae = _build(folder, torch.device("meta"))
    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
    return VAEConfig(
        kind="diffusers",
        source=source,
        channels=_channels(vae),
        factor=_factor(vae),
        latent_scale=1.0 if scale is None else float(scale),
        latent_shift=0.0 if shift is None else float(shift),
        sha256=_sha256(_weights_files(folder)),
        licence=licence,
    )


@dataclass(frozen=True)
class _State:
    """What an autoencoder's weights are, by their memory and how often each was changed in place."""

    weights: tuple[tuple[StorageWeakRef, int], ...]  # a weak reference's address is not used again while it is held

    @classmethod
    def of(cls, autoencoder: nn.Module) -> "_State":
        # tensors made in inference mode count no changes
        versions = ((weight, -1 if weight.is_inference() else weight._version) for weight in autoencoder.parameters())
        return cls(tuple((StorageWeakRef(weight.untyped_storage()), version) for weight, version in versions))


class _Prepared(dict[torch.dtype, tuple[_State, FastAutoencoder | None]]):
    """Fast forms by the type that they compute in, of the weights as they were; a copy of the VAE makes its own."""

    def __reduce__(self) -> Any:
        return _Prepared, ()


class DiffusersVAE(FrozenVAE):
    """A diffusers autoencoder with the latent convention of its config.

    Computes in the weights' type, fp32 or bf16, or in bf16 under such autocast. An AutoencoderKL (FLUX.1's,
    Stable Diffusion's) does so by `vae_fast.py`, with a copy of its weights, and gives results channels last; any other
    by its own code.
    """

    def __init__(self, config: VAEConfig, autoencoder: Any) -> None:
        """Raises `OpenVisionError` where the autoencoder's channels or factor are not the config's."""
        super().__init__(config)
        found = (_channels(autoencoder), _factor(autoencoder))
        if found != (config.channels, config.factor):
            raise OpenVisionError(
                f"the autoencoder at {config.source} has {found[0]} channels and factor {found[1]}, "
                f"its config says {config.channels} and {config.factor}"
            )
        self.autoencoder = autoencoder
        self.compiled, self.prepared = False, _Prepared()
        self.freeze()

    def compile_layers(self) -> None:
        """See `FrozenVAE`."""
        self.compiled = True
        self.prepared.clear()

    def fast(self, inputs: Tensor) -> FastAutoencoder | None:
        """What computes for such inputs; None: the autoencoder's own code, which alone knows tiling and slicing.

        Changes of the weights are noticed, but for those through `.data`, which PyTorch does not count.
        """
        device = inputs.device.type
        if getattr(self.autoencoder, "use_tiling", False) or getattr(self.autoencoder, "use_slicing", False):
            return None
        # FLOPs are counted on the meta device, as the autoencoder is written; an exporter wants its modules
        if device == "meta" or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return None
        dtype = next(self.autoencoder.parameters()).dtype
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            dtype = torch.bfloat16
        state = _State.of(self.autoencoder)
        if dtype not in self.prepared or self.prepared[dtype][0] != state:
            self.prepared.pop(dtype, None)  # its memory first
            self.prepared[dtype] = state, fast_autoencoder(self.autoencoder, dtype, self.compiled)
        return self.prepared[dtype][1]

    def _apply(self, fn: Any, recurse: bool = True) -> "DiffusersVAE":
        super()._apply(fn, recurse)
        self.prepared.clear()
        _refuse_half(next(self.autoencoder.parameters()).dtype)
        return self

    def _encode(self, images: Tensor) -> Tensor:
        if (fast := self.fast(images)) is not None:
            return fast.encode(images).to(images.dtype)
        with _precision(self.autoencoder, images) as dtype:
            output = self.autoencoder.encode(images.to(dtype))
        if hasattr(output, "latent_dist"):
            latents = output.latent_dist.mode()  # the posterior's mean
        elif hasattr(output, "latents"):
            latents = output.latents
        else:
            latents = output.latent
        return latents.to(images.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        if (fast := self.fast(latents)) is not None:
            return fast.decode(latents).to(latents.dtype)
        with _precision(self.autoencoder, latents) as dtype:
            images = self.autoencoder.decode(latents.to(dtype)).sample
        return images.to(latents.dtype)


def load_diffusers_vae(
    source: VAEConfig | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusersVAE:
    """Loads an autoencoder of diffusers from a folder or a hub id (its root or its subfolder `vae`).

    source: a config, or the folder or hub id alone, with the convention that diffusers states for it (`read_config`).
    dtype: fp32 or bf16; FLUX.1's VAE overflows in fp16. Raises `OpenVisionError` for fp16, a missing, gated or
    unreachable source, and weights that are not safetensors, lack tensors, or differ from the config's sha256.
    """
    _refuse_half(dtype)
    config = read_config(source) if isinstance(source, str) else source
    folder = _folder(config.source, config.licence)
    files = _weights_files(folder)
    if config.sha256 and (found := _sha256(files)) != config.sha256:
        raise OpenVisionError(f"{folder}: the weights' sha256 is {found}, expected {config.sha256}")
    return DiffusersVAE(config, _build(folder, torch.device("cpu"))).to(device=device, dtype=dtype)


def _refuse_half(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise OpenVisionError(f"an autoencoder runs in float32 or bfloat16, not {dtype}: FLUX.1's gives NaN in float16")


@contextlib.contextmanager
def _precision(autoencoder: nn.Module, inputs: Tensor) -> Iterator[torch.dtype]:
    """Gives the weights' type, outside of any autocast to fp16: FLUX.1's VAE gives NaN there (InvokeAI #7213)."""
    device = inputs.device.type
    known = device != "meta"  # FLOPs are counted there; autocast does not know it
    half = known and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if half else contextlib.nullcontext():
        yield next(autoencoder.parameters()).dtype


def _channels(vae: Any) -> int:
    return int(vae.config["latent_channels"])


def _factor(vae: Any) -> int:
    """Pixels per latent, each side; each family of autoencoders states it in its own way."""
    config = vae.config
    if ratio := getattr(vae, "spatial_compression_ratio", None):  # AutoencoderDC and newer
        return int(ratio)
    if type(vae).__name__ == "AutoencoderTiny":
        return int(config["upsampling_scaling_factor"]) ** (len(config["encoder_block_out_channels"]) - 1)
    channels = config.get("block_out_channels") or config["down_block_out_channels"]  # AutoencoderKL; asymmetric one
    return 2 ** (len(channels) - 1)


def _folder(source: str, licence: str) -> Path:
    """The folder of `config.json` and weights: the source itself, its subfolder `vae`, or a snapshot of a hub id."""
    root = Path(source).expanduser()
    if not root.is_dir():
        if not source or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise OpenVisionError(f"there is no autoencoder at {source!r}: not a folder, and not a hub id (OWNER/NAME)")
        root = _snapshot(source, licence)
    for folder in (root, root / "vae"):
        if (folder / _CONFIG).is_file():
            return folder
    raise OpenVisionError(f"{root} holds no {_CONFIG} of an autoencoder, nor does its subfolder vae")


def _snapshot(source: str, licence: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    page = f"https://huggingface.co/{source}"
    known = f"its licence: {licence}" if licence else f"its licence is on {page}"
    same = (
        " The same file lies ungated, under Apache-2.0, in the folder vae of Tongyi-MAI/Z-Image-Turbo."
        if source in (FLUX_SOURCE, "black-forest-labs/FLUX.1-dev")
        else ""
    )
    by_hand = (
        f"or put its {_CONFIG} and {_WEIGHTS}.safetensors (in the repository itself or its folder vae) into a folder "
        f"and give that folder as the VAE's source.{same}"
    )
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise OpenVisionError(
            f"{source} is gated ({known}): accept its conditions on {page} and log in (`hf auth login`, or HF_TOKEN), "
            f"{by_hand}"
        ) from None
    except Exception as error:  # offline and not cached, no such repository, a broken transfer: many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        gate = "; it is gated, so accept its conditions there and log in" if same else ""
        raise OpenVisionError(
            f"could not get {source} from the model hub ({known}{gate}): {reason}. Go online, {by_hand}"
        ) from None


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors files of the autoencoder: one, or the shards that its index names."""
    single, index = folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return sorted(folder.glob(f"{_WEIGHTS}-*.safetensors"))
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise OpenVisionError(
            f"{folder} has its weights as a pickle ({', '.join(pickles)}), which is not loaded: save it again with "
            f"diffusers' `save_pretrained`, which writes {_WEIGHTS}.safetensors"
        )
    raise OpenVisionError(f"{folder} holds no {_WEIGHTS}.safetensors")


def _sha256(files: list[Path]) -> str:
    """Of one file as it is; of shards, of their contents one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _class_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / _CONFIG).read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenVisionError(f"{folder / _CONFIG} is not the config of a diffusers autoencoder: {error!r}") from None


def _build(folder: Path, device: torch.device) -> Any:
    """The autoencoder with its weights on the CPU, or without values on the meta device."""
    diffusers: Any = importlib.import_module("diffusers")  # seconds: only those who use it pay

    name = _class_name(folder)
    kind = getattr(diffusers, name, None) if "Autoencoder" in name or name == "VQModel" else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise OpenVisionError(f"{folder / _CONFIG} says {name!r}, which is no autoencoder of diffusers")
    try:
        if device.type == "meta":
            with device:
                return kind.from_config(kind.load_config(folder))
        # Weights are initialised and then overwritten: that must not move the random numbers of a training run.
        with torch.random.fork_rng(devices=[]):
            vae, info = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise OpenVisionError(f"{folder} does not load as {name}: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise OpenVisionError(f"{folder}: the weights lack {len(info['missing_keys'])} tensors of {name}: {some} ...")
    return vae
