"""transformers integration: importing this package makes transformers' Auto classes know OpenVision 3.

>>> import openvision3.hub.hf
>>> from transformers import AutoModel, AutoProcessor, pipeline
>>> model = AutoModel.from_pretrained("folder")  # written by `save_transformers`

`standalone/` holds the vision encoder as files that work without openvision3 (`trust_remote_code=True`).
"""

from openvision3.config import OpenVisionError

try:
    import transformers.utils.output_capturing  # noqa: F401
except ImportError:
    raise OpenVisionError(
        "this needs transformers 5.23 or newer: pip install 'openvision3[vlm]' (or 'transformers>=5.23')"
    ) from None

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from openvision3.hub.hf.config import OpenVision3Config, OpenVision3TextConfig
from openvision3.hub.hf.convert import processor_for, save_transformers, to_transformers
from openvision3.hub.hf.model import OpenVision3Model
from openvision3.hub.hf.processing import OpenVision3Processor, OpenVision3Tokenizer
from openvision3.hub.hf.standalone.configuration_openvision3 import OpenVision3VAEConfig, OpenVision3VisionConfig
from openvision3.hub.hf.standalone.image_processing_openvision3 import OpenVision3ImageProcessor
from openvision3.hub.hf.standalone.modeling_openvision3 import OpenVision3VisionModel
from openvision3.hub.hf.text import OpenVision3TextModel

__all__ = [
    "OpenVision3Config",
    "OpenVision3ImageProcessor",
    "OpenVision3Model",
    "OpenVision3Processor",
    "OpenVision3TextConfig",
    "OpenVision3TextModel",
    "OpenVision3Tokenizer",
    "OpenVision3VAEConfig",
    "OpenVision3VisionConfig",
    "OpenVision3VisionModel",
    "processor_for",
    "save_transformers",
    "to_transformers",
]

# Config types first: LLaVA builds its vision tower from them.
for _config in (OpenVision3VAEConfig, OpenVision3VisionConfig, OpenVision3TextConfig, OpenVision3Config):
    AutoConfig.register(_config.model_type, _config)
AutoModel.register(OpenVision3VisionConfig, OpenVision3VisionModel)
AutoModel.register(OpenVision3TextConfig, OpenVision3TextModel)
AutoModel.register(OpenVision3Config, OpenVision3Model)
AutoModelForZeroShotImageClassification.register(OpenVision3Config, OpenVision3Model)
for _config in (OpenVision3VisionConfig, OpenVision3Config):
    _backends: dict[str, type] = {"torchvision": OpenVision3ImageProcessor, "pil": OpenVision3ImageProcessor}  # the one
    AutoImageProcessor.register(_config, image_processor_classes=_backends)
AutoTokenizer.register(OpenVision3Config, OpenVision3Tokenizer)
AutoProcessor.register(OpenVision3Config, OpenVision3Processor)
