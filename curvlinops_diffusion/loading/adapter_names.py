"""From the names that trainers give layers in an adapter's file to those of the networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

# which part of a pipeline a name begins with; nothing is the denoiser
_PARTS = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "diffusion_model.": "",
    "unet.": "",
    "transformer.": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",  # T5, which is Flux' second
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
# names that loaders do not know, whose layers are found here; and that of Stable Diffusion 3
_OF_NO_LOADER = re.compile(r"lora_te3_|lycoris_")
_OF_NO_LOADER_3 = re.compile(r"lora_te\d_|lycoris_|lora_unet_|diffusion_model\.")
# blocks of Stable Diffusion 3 by their original names, as kohya's scripts have them: the layers
# in diffusers, several where they were one
_JOINT_BLOCK = re.compile(r"lora_unet_joint_blocks_(\d+)_(x|context)_block_(\w+)")
_OF_JOINT_BLOCK = {
    ("x", "attn_qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("x", "attn_proj"): ("attn.to_out.0",),
    ("x", "attn2_qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("x", "attn2_proj"): ("attn2.to_out.0",),
    ("x", "mlp_fc1"): ("ff.net.0.proj",),
    ("x", "mlp_fc2"): ("ff.net.2",),
    ("x", "adaLN_modulation_1"): ("norm1.linear",),
    ("context", "attn_qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("context", "attn_proj"): ("attn.to_add_out",),
    ("context", "mlp_fc1"): ("ff_context.net.0.proj",),
    ("context", "mlp_fc2"): ("ff_context.net.2",),
    ("context", "adaLN_modulation_1"): ("norm1_context.linear",),
}


@dataclass(frozen=True)
class Place:
    """A layer that a name in a file stands for, or one of several.

    Attributes:
        part: The part of the pipeline.
        layer: The layer's name there.
        rows: The numbers of the rows of the file's weight that are the layer's; ``None`` for all.
    """

    part: str
    layer: str
    rows: Tensor | None = None


class Names:
    """Names of layers in files of adapters, by the loader of a pipeline or a denoiser.

    Args:
        parts: The networks by their names in the pipeline, the denoiser first.
        loader: The pipeline; or the denoiser.

    Attributes:
        alone: Whether there is no pipeline, so that all names are the denoiser's.
        parts, loader: As given.
    """

    def __init__(self, parts: Mapping[str, nn.Module], loader: Any):
        self.alone = loader is next(iter(parts.values()))
        self.parts, self.loader = dict(parts), loader

    def has_no_loader(self, name: str) -> bool:
        """Tell whether the loader does not know such names in files."""
        of_3 = type(self.loader).__name__.startswith("StableDiffusion3")
        return (_OF_NO_LOADER_3 if of_3 else _OF_NO_LOADER).match(name) is not None

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename, split and join tensors as the loader does."""
        if self.alone:
            return {key: z for key, z in tensors.items() if not key.endswith(".alpha")}
        config = getattr(getattr(self.loader, "unet", None), "config", None)
        own = {} if config is None else {"unet_config": config}
        result = self.loader.lora_state_dict(dict(tensors), **own)
        return dict(result[0] if isinstance(result, tuple) else result)

    def by_part(self, converted: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
        """Map parts, there or not, to the loader's names of their weights by PEFT's names."""
        found: dict[str, dict[str, str]] = {}
        for key in converted:
            part = next(iter(self.parts)) if self.alone else key.split(".")[0]
            found.setdefault(part, {})[key if self.alone else key.removeprefix(f"{part}.")] = key
        for part, keys in found.items():
            if not part.startswith("text_encoder"):
                # also where some are PEFT's: diffusers' scripts rename those of attention alone
                found[part] = dict(convert_unet_state_dict_to_peft(keys))
                continue
            if any("lora_A" in key for key in keys):
                continue
            for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
                keys = convert_state_dict_to_peft(keys, original_type=kind)
            if not hasattr(self.parts.get(part), "text_model"):  # as transformers had it before
                keys = {name.removeprefix("text_model."): key for name, key in keys.items()}
            found[part] = keys
        return found

    def places(self, outputs: Mapping[str, int]) -> dict[str, list[Place]]:
        """Find the layers of names, by themselves, or by what the loader makes of such names.

        Scripts name layers by their places in the network, with underscores for dots; or by those
        in the original network. These are asked of the loader, by a pair of matrices for each name
        whose rows are numbered. ``outputs`` are the outputs of each layer by its name in the file.
        """
        layers = {
            part: {name.replace(".", "_"): name for name, _ in module.named_modules()}
            for part, module in self.parts.items()
        }
        found: dict[str, list[Place]] = {}
        kohyas: dict[str, str] = {}  # as kohya's scripts would have it: the name in the file
        for stem in outputs:
            prefix = next((prefix for prefix in _PARTS if stem.startswith(prefix)), "")
            part = _PARTS.get(prefix) or next(iter(self.parts))
            if part == "text_encoder_3" and part not in self.parts:
                part = "text_encoder_2"
            flat, there = stem.removeprefix(prefix).replace(".", "_"), layers.get(part, {})
            layer = there.get(flat, there.get(flat.removeprefix("text_model_")))
            if layer:
                found[stem] = [Place(part, layer)]
            elif not _PARTS.get(prefix):
                kohyas[f"lora_unet_{flat}"] = stem
        names = {part: set(own.values()) for part, own in layers.items()}
        counts = {name: outputs[stem] for name, stem in kohyas.items()}
        asked = self._asked({stem: n for stem, n in outputs.items() if stem not in found})
        for other in (self._of_joint_blocks(counts), {} if asked else self._asked(counts)):
            asked |= {kohyas[name]: places for name, places in other.items()}
        for stem, places in asked.items():
            if all(place.layer in names[place.part] for place in places):
                found[stem] = places
        return found

    def _of_joint_blocks(self, outputs: Mapping[str, int]) -> dict[str, list[Place]]:
        """The layers of names of Stable Diffusion 3's blocks, there or not."""
        part, model = next(iter(self.parts.items()))
        modules, found = dict(model.named_modules()), dict[str, list[Place]]()
        for stem, count in outputs.items():
            match = _JOINT_BLOCK.fullmatch(stem)
            if match is None or (match[2], match[3]) not in _OF_JOINT_BLOCK:
                continue
            own = _OF_JOINT_BLOCK[match[2], match[3]]
            layers = [f"transformer_blocks.{match[1]}.{name}" for name in own]
            rows = list(torch.arange(count).chunk(len(layers)))
            norm = modules.get(layers[0].removesuffix(".linear"))
            if type(norm).__name__ == "AdaLayerNormContinuous":  # of diffusers: scale before shift
                rows = [torch.cat(rows[0].chunk(2)[::-1])]
            found[stem] = [Place(part, *each) for each in zip(layers, rows, strict=True)]
        return found

    def _asked(self, outputs: Mapping[str, int]) -> dict[str, list[Place]]:
        """The layers that the loader has for names, there or not."""
        if not outputs:
            return {}
        pairs = {}
        for n, (stem, rows) in enumerate(outputs.items(), 1):
            pairs[f"{stem}.lora_down.weight"] = torch.full((1, 1), float(n))
            pairs[f"{stem}.lora_up.weight"] = torch.arange(1.0, rows + 1).unsqueeze(1)
            pairs[f"{stem}.alpha"] = torch.tensor(1.0)  # of rank 1, so that nothing is scaled
        try:
            tensors = self.converted(pairs)
            parts = self.by_part(tensors)
        except Exception:  # it has none, in whatever words
            return {}
        stems, found = list(outputs), dict[str, list[Place]]()
        for part, keys in parts.items():
            for name, key in keys.items():
                layer, end, side = name.partition(".lora_A")
                up = keys.get(f"{layer}.lora_B{side}")
                if not end or up is None or part not in self.parts:
                    continue
                stem, own = stems[int(tensors[key].max()) - 1], tensors[up].flatten().long() - 1
                whole = torch.equal(own, torch.arange(outputs[stem]))
                found.setdefault(stem, []).append(Place(part, layer, None if whole else own))
        return found
