"""`ov3 generate eval`: scores of generated pictures against a reference, each with its protocol and hashes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openvision3.commands import common
from openvision3.commands.batching import OutputOptions
from openvision3.commands.common import ModelOptions
from openvision3.config import OpenVisionError

if TYPE_CHECKING:
    from openvision3.evaluation.fidelity import FeatureNetwork
    from openvision3.evaluation.samples import SampleSet
    from openvision3.evaluation.scene_classifier import SceneClassifier


@dataclass(frozen=True)
class GenerateEvalOptions:
    """What generated pictures are compared with, and who judges what they show."""

    reference: Path  # real pictures: a folder, or a .npz such as ADM's (mu, sigma, mu_s, sigma_s; or arr_0, pictures)
    samples_used: int = 0  # generated pictures used, spread evenly; 0: all
    reference_used: int = 0  # real pictures used; 0: all
    inception: str = ""  # file of Inception's weights; without it, distances on EfficientNet-Lite0's features
    model: str = ""  # its zero-shot head says what each sample shows (samples.jsonl has what it should); "": left out
    classifier: Path | None = None  # a scene classifier's folder (train_scene_classifier), which says so too
    num_names: int = 0  # labels to choose among: so many of the demo's names; 0: the classifier's, else the samples'
    batch_size: int = 32  # of the model's pictures
    device: str = "auto"  # auto: cuda, then mps, then cpu; or cpu, cuda, cuda:1, mps


Options = Annotated[GenerateEvalOptions, tyro.conf.arg(name="")]
Output = Annotated[OutputOptions, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]


def generate_eval(
    samples: Annotated[Path, tyro.conf.Positional], options: Options, output: Output = OutputOptions()
) -> int:
    """gFID, sFID, Inception Score, precision, recall, KID and class accuracy of generated pictures.

    samples: a folder of square pictures of one size, or a .npz with arr_0 (uint8, N x S x S x 3). What each should show
    is read from samples.jsonl in the folder: a line {"file": ..., "class": NAME} (or "prompt": TEXT) a picture.
    """
    common.refuse_existing(output.json, output.overwrite)
    from openvision3.evaluation.generated import evaluate_generated
    from openvision3.evaluation.picture_sets import open_generated, open_reference

    if min(options.samples_used, options.reference_used, options.num_names) < 0:
        raise OpenVisionError("--samples-used, --reference-used and --num-names must be 0 or more")
    pictures = open_generated(samples, options.samples_used)
    judges = _Judges(samples, options)  # what is missing for them is said before the long part
    reference = open_reference(options.reference, pictures.size, options.reference_used)
    network = _network(options)
    with common.Progress(None, "pictures") as progress:
        figures = evaluate_generated(pictures, reference, network, lambda done: progress.advance(done - progress.done))
    failed = pictures.failed + (reference.pictures.failed if reference.pictures else [])
    figures |= judges.judge(pictures)
    _print(figures)
    common.write_json(output.json, figures, output.overwrite)
    for name, reason in failed:
        common.fail(reason if name in reason else f"{name}: {reason}")
    return 1 if failed else 0


class _Judges:
    """Those that say what a sample shows, loaded, and what the samples should show."""

    def __init__(self, samples: Path, options: GenerateEvalOptions) -> None:
        self.model: Any = None
        self.classifier: SceneClassifier | None = None
        self.batch_size = options.batch_size
        if not options.model and options.classifier is None:
            return
        from openvision3.evaluation.class_accuracy import intended_labels, read_intended
        from openvision3.evaluation.retrieval import require_text_encoder
        from openvision3.evaluation.scene_classifier import load_scene_classifier

        self.intended = read_intended(samples)
        if not self.intended:
            raise OpenVisionError(f"{samples}: its samples.jsonl names no picture's class")
        self.labels = intended_labels(self.intended, options.num_names)
        if options.classifier is not None:
            self.classifier = load_scene_classifier(options.classifier)
            self.labels = self.labels if options.num_names else self.classifier.names
        if options.model:
            self.model = common.load_model(ModelOptions(model=options.model, device=options.device))
            require_text_encoder(self.model, "class accuracy")

    def judge(self, pictures: "SampleSet") -> dict[str, Any]:
        """Accuracies by each judge, under "zeroshot" and "classifier"."""
        from openvision3.evaluation.class_accuracy import classifier_accuracy, zeroshot_accuracy

        figures: dict[str, Any] = {}
        if self.model is not None:
            figures["zeroshot"] = zeroshot_accuracy(self.model, pictures, self.intended, self.labels, self.batch_size)
        if self.classifier is not None:
            figures["classifier"] = classifier_accuracy(self.classifier, pictures, self.intended)
        return figures


def _network(options: GenerateEvalOptions) -> "FeatureNetwork":
    """Inception with all its parts where its weights are, else EfficientNet-Lite0."""
    from openvision3.evaluation.fidelity import inception_path, load_effnet_lite0, load_inception
    from openvision3.evaluation.inception import GenerationInception
    from openvision3.training.precision import resolve_device

    device = resolve_device(options.device)
    if inception_path(options.inception) is not None:
        return GenerationInception(load_inception(options.inception, device))
    return load_effnet_lite0(device)


def _print(figures: dict[str, Any]) -> None:
    for side in ("samples", "reference"):
        about = figures[side]
        stored = ", with stored statistics" if about.get("stored_statistics") and about["n"] else ""
        print(f"{side}: {about['what']}{stored}; {about['n']} used; sha256 {about['sha256']}")
    common.print_table("generated pictures", ("figure", "value"), list(figures["figures"].items()))
    print(f"({figures['protocol']})")
    for judge in [judge for judge in ("zeroshot", "classifier") if judge in figures]:
        rows = [(name, value) for name, value in figures[judge].items() if isinstance(value, int | float)]
        common.print_table(f"what samples show, by {judge}", ("figure", "value"), rows)
        print(f"({figures[judge]['protocol']})")
    print("versions: " + ", ".join(f"{name} {version}" for name, version in figures["versions"].items()))
    for part, reason in figures["left_out"].items():
        print(f"left out: {part}: {reason}", file=sys.stderr)
