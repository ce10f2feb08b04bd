"""Pictures to pixels in [-1, 1] for OpenVision 3: the short side resized and the centre cropped, or padded to 16s."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict

MULTIPLE = 16  # pixels per token, each side


class OpenVision3ImageProcessor(PilBackend):
    """Gives what `openvision3.preprocess(picture, size)` gives: bicubic with antialiasing, by Pillow.

    With `do_resize=False` a picture keeps its pixels, padded to multiples of 16 by reflection at the right and the
    bottom, as by `openvision3.preprocess(picture)`. Raises `ValueError` for a crop that is no multiple of 16.
    """

    _auto_class = "AutoImageProcessor"
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 256}
    crop_size = {"height": 256, "width": 256}
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs: Any) -> np.ndarray:
        """(3, H, W) with its short side resized to `shortest_edge`; other kinds of size as transformers does them."""
        if not size.shortest_edge or size.longest_edge:
            return super().resize(image, size, resample, **kwargs)
        height, width = image.shape[1:]
        # Only the middle is kept: without the ends of a very long picture, resizing it can't take all memory.
        limit = 4 * min(height, width)
        image = _crop(image, min(height, limit + (height - limit) % 2), min(width, limit + (width - limit) % 2))
        short = min(image.shape[1:])
        height, width = (max(size.shortest_edge, round(side * size.shortest_edge / short)) for side in image.shape[1:])
        return super().resize(image, SizeDict(height=height, width=width), resample, **kwargs)

    def _preprocess(self, images: list[np.ndarray], do_resize: bool, do_center_crop: bool, **kwargs: Any) -> Any:
        crop = kwargs["crop_size"]
        if do_center_crop and do_resize and (crop.height % MULTIPLE or crop.width % MULTIPLE):
            raise ValueError(f"crop_size {crop.height} x {crop.width} must be multiples of {MULTIPLE}")
        if not do_resize:
            images = [_pad(x) for x in images]
            do_center_crop = False
        return super()._preprocess(images, do_resize=do_resize, do_center_crop=do_center_crop, **kwargs)


def _crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of (3, H, W), which is at least that large."""
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def _pad(image: np.ndarray) -> np.ndarray:
    """(3, H, W) reflected at the right and the bottom, as often as needed, to multiples of 16."""
    _, height, width = image.shape
    return np.pad(image, ((0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE)), mode="reflect")


__all__ = ["OpenVision3ImageProcessor"]
