"""Image models of ``transformers``, by whose features images are compared.

Legend: B images, F features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel


class ImageModel:
    """A function of images: the features of a pretrained image model.

    Those that a model of images and text compares to texts (CLIP, SigLIP); of others the pooled
    output, or where there is no trained one the mean over tokens.

    Args:
        path: The folder of the model and of its image processor, as ``save_pretrained`` writes
            them.

    Raises:
        ValueError: If there is no such model, some of its weights are missing, or it masks its
            input at random.
    """

    def __init__(self, path: Path):
        try:
            self._processor = AutoImageProcessor.from_pretrained(path)
            model, found = AutoModel.from_pretrained(path, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"'{path}' (`embedding`) is not the folder of a transformers image model and its "
                f"image processor: {' '.join(str(error).split())[:300]}"
            ) from error
        missing = sorted(found["missing_keys"])
        # a pooler that the folder does not hold has random weights
        self.pools = not missing
        if not all("pooler" in name for name in missing):
            raise ValueError(
                f"'{path}' (`embedding`) lacks {len(missing)} of the model's weights, "
                f"'{missing[0]}' first. Pass a folder that holds all of them."
            )
        if getattr(model.config, "mask_ratio", 0):
            raise ValueError(
                f"'{path}' (`embedding`) is of a model that masks parts of its input at random "
                "(mask_ratio). Pass another one, DINO or CLIP say."
            )
        self.model = model.float().eval()
        #: How images are resized and normalised.
        self.settings: str = self._processor.to_json_string()

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """The features ``[B, F]`` of images in [-1, 1].

        Raises:
            ValueError: If they have neither one channel nor three.
        """
        B, C = x_BCHW.shape[:2]
        if C not in (1, 3):
            raise ValueError(
                f"`embedding` needs images of 1 or 3 channels, got {C}. Pass a function of them."
            )
        images = list((x_BCHW.clamp(-1, 1).float().cpu().expand(B, 3, -1, -1) + 1) / 2)
        pixels = self._processor(images=images, do_rescale=False, return_tensors="pt")
        model = self.model.to(x_BCHW.device)
        with torch.no_grad():
            of_text = hasattr(model, "get_image_features")
            found = (model.get_image_features if of_text else model)(**pixels.to(x_BCHW.device))
        if isinstance(found, Tensor):
            return found
        pooled = getattr(found, "pooler_output", None) if self.pools else None
        if pooled is not None:
            return pooled.flatten(1)
        last = found.last_hidden_state  # tokens [B, T, F], or of convolutions [B, F, H, W]
        return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)
