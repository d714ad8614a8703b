"""CLIP: the text encoders of Stable Diffusion, the vision towers, and the safety checker on top of one.

All are transformers with a norm before each part. Text looks only back and ends in a norm; a picture is a
class token and its patches, and of its end only the class token is normed, to be the pooled output. Stable
Diffusion 1.x has the ViT-L/14 text encoder with `quick_gelu`; 2.x has the ViT-H/14 of OpenCLIP with the exact
GELU and without its last layer. ChronoEdit reads the vision tower of ViT-H/14 before its last layer, which
then does not run.

Hidden states are numbered as everywhere: 0 is the input of the first layer, i the output of layer i; counted
from the end, -1 is the output of the last layer, -2 of the last but one. The final norm is in none of them.

B batch   L tokens, in a picture the class token and P patches   D width   H heads   E = D / H
Source: arXiv 2103.00020; transformers `models/clip`; diffusers `stable_diffusion/safety_checker.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.encoder_spellings import answer, check_all_attended, check_unused
from joyedit.checkpoints.network import Network
from joyedit.models.layers import Conv2d, LayerNorm, Linear

log = logging.getLogger("joyedit")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def _check_numbers(config: Config, *integers: str) -> None:
    for name in integers:
        if not isinstance(config[name], int):
            raise ValueError(f"{name}={config[name]!r}: must be one integer")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ValueError(f"hidden_size={width}: must be a multiple of num_attention_heads={heads}")


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """A text encoder; the defaults are those of Stable Diffusion 1.5."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int | None = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    eos_token_id: int = 2  # of the files before transformers 4.31; see `CLIPTextModel.forward`
    pad_token_id: int | None = 1
    use_attention_mask: bool = False
    architectures: tuple[str, ...] | None = ("CLIPTextModel",)
    dtype: str | None = "float32"
    model_type: str = "clip_text_model"

    aliases = {"torch_dtype": "dtype"}
    supported = {
        "hidden_act": tuple(ACTIVATIONS),
        "use_attention_mask": (False,),
        "model_type": ("clip_text_model",),
    }
    keeps_unknown = True

    def __post_init__(self):
        super().__post_init__()
        _check_numbers(self, "vocab_size", "eos_token_id")


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """A vision tower; the defaults are those of ChronoEdit's image encoder, ViT-H/14."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    projection_dim: int = 1024
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    architectures: tuple[str, ...] | None = ("CLIPVisionModelWithProjection",)
    dtype: str | None = "bfloat16"
    model_type: str = "clip_vision_model"

    aliases = {"torch_dtype": "dtype"}
    supported = {"hidden_act": tuple(ACTIVATIONS), "model_type": ("clip_vision_model",)}
    keeps_unknown = True

    # What transformers takes for a key that the nested config of an older file leaves out.
    WHEN_ABSENT: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "architectures": None,
        "dtype": None,
    }

    def __post_init__(self):
        super().__post_init__()
        _check_numbers(self, "image_size", "patch_size")


VIT_L_14 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=768,
    num_hidden_layers=24,
    hidden_act="quick_gelu",
    architectures=None,
    dtype=None,
)


@dataclass(frozen=True)
class StableDiffusionSafetyCheckerConfig(Config):
    """The checker of Stable Diffusion 1.x, on ViT-L/14. Its file is that of a whole CLIP: the text half,
    which nothing uses, is kept for the round trip."""

    vision_config: CLIPVisionConfig = VIT_L_14
    projection_dim: int = 768
    architectures: tuple[str, ...] | None = ("StableDiffusionSafetyChecker",)
    dtype: str | None = "float32"
    model_type: str = "clip"

    aliases = {"torch_dtype": "dtype"}
    supported = {"model_type": ("clip",)}
    keeps_unknown = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Also takes the `vision_config_dict` of older files, whose values win, as in transformers."""
        values = {key: value for key, value in raw.items() if key != "vision_config_dict"}
        nested = [raw[key] for key in ("vision_config", "vision_config_dict") if raw.get(key)]
        if nested:
            filled = [{**CLIPVisionConfig.WHEN_ABSENT, **part} for part in nested]
            values["vision_config"] = {key: value for part in filled for key, value in part.items()}
        return super().from_dict(values)


class TextOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, L, D), normed
    pooler_output: Tensor  # (B, D), its row at the end of the text


class VisionOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, 1 + P, D), not normed
    pooler_output: Tensor  # (B, D), its class token, normed


class ImageEmbeds(NamedTuple):
    image_embeds: Tensor  # (B, projection_dim)
    last_hidden_state: Tensor  # (B, 1 + P, D), not normed


class SafetyScores(NamedTuple):
    """How far each picture is beyond the threshold of each concept, rounded to three digits."""

    special: Tensor  # (B, 3), concepts that make the others stricter
    concepts: Tensor  # (B, 17); one above zero flags the picture


class CLIPTextModel(Network):
    Config = CLIPTextConfig
    table = "clip"
    weights_stem = "model"
    library = "transformers"
    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__(config or CLIPTextConfig())
        config = self.config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> TextOutput:
        """input_ids (B, L), L <= 77, padded as the tokenizer does: padding is attended to like text.

        Pooled is the row of the first token `eos_token_id`. Where that is 2, an error of the published
        configs, it is the row of the largest id, which is the end of a text without learned words. Both
        outputs are in the dtype of the weights. output_hidden_states=True adds `hidden_states`, numbered as
        above. Raises ValueError for ids that do not fit, or a mask that leaves something out.
        """
        check_all_attended(attention_mask)
        check_unused(unused)
        kept: list[Tensor] | None = [] if output_hidden_states else None
        states = self.final_layer_norm(self._states(input_ids, self.config.num_hidden_layers, kept))
        states = states.to(self.dtype)
        eos = self.config.eos_token_id
        ends = (input_ids if eos == 2 else (input_ids == eos).long()).argmax(dim=1)  # (B,)
        output = TextOutput(states, states[torch.arange(len(states), device=states.device), ends])
        return answer(output, kept and [state.to(self.dtype) for state in kept], return_dict)

    def encode(self, input_ids: Tensor, clip_skip: int | None = None) -> Tensor:
        """Prompt embeddings (B, L, D) in the dtype of the weights: a hidden state, then the final norm.

        clip_skip: leave out that many of the last layers; None is 0. Raises ValueError for ids that do not
        fit, or for more layers than there are.
        """
        layers = self.config.num_hidden_layers
        if clip_skip is not None and not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip}: must be between 0 and {layers}, the number of layers")
        return self.final_layer_norm(self._states(input_ids, layers - (clip_skip or 0))).to(self.dtype)

    def hidden_states(self, input_ids: Tensor, layer: int = -1) -> Tensor:
        """Hidden state `layer` (B, L, D) in the dtype of the weights; later layers do not run. Raises
        ValueError for ids that do not fit, or when there is no such layer."""
        return self._states(input_ids, _number(layer, self.config)).to(self.dtype)

    def _states(self, input_ids: Tensor, number: int, kept: list[Tensor] | None = None) -> Tensor:
        x = self.embeddings(input_ids, ops.compute_dtype(self.dtype, input_ids.device))
        return self.encoder(x, number, kept)

    def config_to_save(self) -> dict[str, Any]:
        return _saved(self)


class CLIPVisionModel(Network):
    Config = CLIPVisionConfig
    table = "clip"
    relatives = frozenset({"CLIPVisionModelWithProjection"})  # whose folder loads without the projection
    weights_stem = "model"
    library = "transformers"
    config: CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig | None = None):
        super().__init__(config or CLIPVisionConfig())
        config = self.config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # sic, in all checkpoints
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> VisionOutput:
        """pixel_values: as of `hidden_states`. Both outputs are in its dtype. output_hidden_states=True adds
        `hidden_states`, numbered as above."""
        check_unused(unused)
        kept: list[Tensor] | None = [] if output_hidden_states else None
        states = self._states(pixel_values, self.config.num_hidden_layers, kept)
        pooled = self.post_layernorm(states[:, 0])
        output = VisionOutput(states.to(pixel_values.dtype), pooled.to(pixel_values.dtype))
        return answer(output, kept and [state.to(pixel_values.dtype) for state in kept], return_dict)

    def hidden_states(self, pixel_values: Tensor, layer: int = -1) -> Tensor:
        """Hidden state `layer` (B, 1 + P, D) in the dtype of pixel_values; later layers do not run.

        pixel_values (B, 3, image_size, image_size), normalised as the image processor does. Raises
        ValueError for another shape, or when there is no such layer.
        """
        return self._states(pixel_values, _number(layer, self.config)).to(pixel_values.dtype)

    def _states(self, pixel_values: Tensor, number: int, kept: list[Tensor] | None = None) -> Tensor:
        config = self.config
        wanted = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.shape[1:] != wanted or not len(pixel_values):
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)}: must be {('batch', *wanted)}")
        x = pixel_values.to(ops.compute_dtype(self.dtype, pixel_values.device))
        return self.encoder(self.pre_layrnorm(self.embeddings(x)), number, kept)

    def config_to_save(self) -> dict[str, Any]:
        return _saved(self)


class CLIPVisionModelWithProjection(Network):
    Config = CLIPVisionConfig
    table = "clip"
    weights_stem = "model"
    library = "transformers"
    config: CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig | None = None):
        super().__init__(config or CLIPVisionConfig())
        self.vision_model = CLIPVisionModel(self.config)
        self.visual_projection = Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> ImageEmbeds:
        """pixel_values: as of `hidden_states`. Both outputs are in its dtype. output_hidden_states=True adds
        `hidden_states`, numbered as above."""
        found: Any = self.vision_model(pixel_values, output_hidden_states, **unused)
        output = ImageEmbeds(self.visual_projection(found.pooler_output), found.last_hidden_state)
        return answer(output, found.hidden_states if output_hidden_states else None, return_dict)

    def hidden_states(self, pixel_values: Tensor, layer: int = -1) -> Tensor:
        """As `CLIPVisionModel.hidden_states`."""
        return self.vision_model.hidden_states(pixel_values, layer)

    def config_to_save(self) -> dict[str, Any]:
        return _saved(self)


class StableDiffusionSafetyChecker(Network):
    """Compares the embedding of a picture with those of 20 concepts, each with a threshold of its own."""

    Config = StableDiffusionSafetyCheckerConfig
    table = "clip"
    weights_stem = "model"
    library = "stable_diffusion"
    config: StableDiffusionSafetyCheckerConfig

    def __init__(self, config: StableDiffusionSafetyCheckerConfig | None = None):
        super().__init__(config or StableDiffusionSafetyCheckerConfig())
        vision, dim = self.config.vision_config, self.config.projection_dim
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = Linear(vision.hidden_size, dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(17, dim))
        self.special_care_embeds = nn.Parameter(torch.ones(3, dim))
        self.concept_embeds_weights = nn.Parameter(torch.ones(17))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(3))

    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """(images, flags): a copy of `images` with the flagged ones black, and one flag for each.

        clip_input (B, 3, 224, 224) from the image processor; images: the same B pictures as a tensor, an
        array, or a list of either. Raises ValueError when the numbers differ.
        """
        if len(clip_input) != len(images):
            raise ValueError(f"clip_input has {len(clip_input)} pictures, images {len(images)}")
        flags = (self.scores(clip_input).concepts > 0).any(dim=1).tolist()
        if any(flags):
            log.warning(
                "the safety checker takes %d of %d images for unsafe and returns them black; another prompt "
                "or seed may help",
                sum(flags),
                len(flags),
            )
        return blacken(images, flags), flags

    def scores(self, clip_input: Tensor) -> SafetyScores:
        """The scores that decide, in fp32. clip_input (B, 3, 224, 224)."""
        embeds = F.normalize(self.visual_projection(self.vision_model(clip_input).pooler_output).float())
        special = self._margins(embeds, self.special_care_embeds, self.special_care_embeds_weights)
        concepts = self._margins(embeds, self.concept_embeds, self.concept_embeds_weights)
        stricter = torch.zeros_like(special[:, 0])
        scores = []
        for margin in special.unbind(dim=1):
            scores.append((margin + stricter).round(decimals=3))
            stricter = stricter.masked_fill(scores[-1] > 0, 0.01)
        return SafetyScores(torch.stack(scores, dim=1), (concepts + stricter[:, None]).round(decimals=3))

    @staticmethod
    def _margins(embeds: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
        """Cosine similarity less its threshold. embeds (B, D), of length 1; concepts (K, D) -> (B, K)."""
        return embeds @ F.normalize(concepts.float()).T - thresholds.float()

    def config_to_save(self) -> dict[str, Any]:
        return _saved(self)


class TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """input_ids (B, L) -> (B, L, D) in `dtype`. Textual inversion may have added rows of tokens."""
        tokens, positions = self.token_embedding.weight, self.position_embedding.weight
        if input_ids.ndim != 2 or not input_ids.numel() or input_ids.shape[1] > len(positions):
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)}: must be (batch, 1 to {len(positions)} tokens)"
            )
        low, high = input_ids.aminmax()
        if low < 0 or high >= len(tokens):
            raise ValueError(f"input_ids from {low} to {high}: the text encoder has {len(tokens)} tokens")
        return self.token_embedding(input_ids).to(dtype) + positions[: input_ids.shape[1]].to(dtype)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(1 + patches, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, image_size, image_size) -> (B, 1 + P, D), row by row after the class token."""
        patches = rearrange(self.patch_embedding(x), "b d h w -> b (h w) d")
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight.to(x.dtype)


class Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, number: int, kept: list[Tensor] | None = None) -> Tensor:
        """x (B, L, D) through the first `number` layers; `kept` gets x and what each of them gives."""
        keep = kept.append if kept is not None else _forget
        keep(x)
        for layer in islice(self.layers, number):
            x = layer(x)
            keep(x)
        return x


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, causal)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h e) -> b l h e", h=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(ops.attention(q, k, v, causal=self.causal).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _forget(x: Tensor) -> None:
    """A hidden state that nobody asked for."""


def blacken(images: Any, flags: Sequence[bool]) -> Any:
    """A copy of `images` (tensor, array, or list of either) with the flagged ones zero."""
    if isinstance(images, (list, tuple)):
        return [blacken(image[None], [flag])[0] for image, flag in zip(images, flags, strict=True)]
    out = images.clone() if isinstance(images, Tensor) else images.copy()
    for index, flag in enumerate(flags):
        if flag:
            out[index] = 0
    return out


def _number(layer: int, config: CLIPTextConfig | CLIPVisionConfig) -> int:
    """How many layers run for hidden state `layer`."""
    layers = config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"layer={layer}: there are the hidden states 0 to {layers}, or -{layers + 1} to -1")
    return layer if layer >= 0 else layer + layers + 1


def _saved(network: Network) -> dict[str, Any]:
    """The config as transformers writes it, with the dtype of the weights now: transformers loads in it."""
    dtype = str(network.dtype).removeprefix("torch.")
    return {**network.config.to_dict(), "architectures": [type(network).__name__], "dtype": dtype}
