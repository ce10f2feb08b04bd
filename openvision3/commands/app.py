"""`ov3 app`: the model on a web page."""

import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from openvision3.commands import common
from openvision3.commands.common import ModelOptions
from openvision3.config import OpenVisionError


@dataclass(frozen=True)
class AppOptions(ModelOptions):
    """The models, and where the page is."""

    generator: str = "demo"  # for the tab Generate: "demo", or a folder of `ov3 generate train`
    vlm: str = "demo"  # for the tab Ask: "demo", or a folder of `ov3 vlm train` or of any LLaVA
    host: str = "127.0.0.1"  # 0.0.0.0: for other machines too
    port: int = 7860
    share: bool = False  # also at a public address for a week, through Gradio's servers


def app(options: Annotated[AppOptions, tyro.conf.arg(name="")]) -> int:
    """Serves a page that reconstructs, captions, classifies, generates and answers, until Ctrl-C."""
    if not 1 <= options.port <= 65535:
        raise OpenVisionError(f"--port {options.port}: expected 1 to 65535")
    with tempfile.TemporaryDirectory(prefix="ov3-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads: other Gradio pages share another; read at its import
        from openvision3.app import page  # says what to install before anything is loaded
        from openvision3.app.functions import load_parts

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are deleted then, too
        parts = load_parts(common.load_model(options), options.generator, options.vlm)
        for tab, reason in parts.reasons.items():
            common.fail(f"the tab {tab}: {reason}")
        blocks = page.build(parts, options.model, Path(folder) / "examples")
        try:
            print(f"OpenVision 3 at {page.launch(blocks, options.host, options.port, options.share)}", flush=True)
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)
    return 0
