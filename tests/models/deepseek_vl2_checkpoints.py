"""Small DeepSeek-VL2 models, made of transformers' SigLIP and DeepSeek-V2 and of the paper's definition, and inputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama.modeling_llama import LlamaAttention

from mmkernels.testing.models import randomise

MARKER, VOCAB, SIDE = 99, 128, 28  # a tile has 3 x 3 patches, from which 2 x 2 tokens are made
Tiles = tuple[int, int]

# Changes to the released kind of configuration: `vision__x` sets x in vision_config, and so on.
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_vl2": {},
    "deepseek_vl2_shards": {
        "shard": True,
        "global_view_pos": "tail",
        "language__q_lora_rank": 24,
        "language__attention_bias": True,
        "language__rms_norm_eps": 1e-5,
        "language__topk_method": "group_limited_greedy",
        "language__n_group": 4,
        "language__topk_group": 2,
        "language__routed_scaling_factor": 1.5,
        "projector__mlp_ratio": 2,
    },
    "deepseek_vl2_plain": {  # as DeepSeek-VL2-tiny
        "language__use_mla": False,
        "language__kv_lora_rank": None,
        "language__qk_rope_head_dim": 0,
        "language__qk_nope_head_dim": 0,
        "language__v_head_dim": 0,
    },
    "deepseek_vl2_sigmoid": {  # as DeepSeek-VL2 of 27B
        "language__topk_method": "noaux_tc",
        "language__scoring_func": "sigmoid",
        "language__norm_topk_prob": True,
        "language__routed_scaling_factor": 2.0,
    },
}
FIRST, SIGMOID = "deepseek_vl2", "deepseek_vl2_sigmoid"


def config(variant: str) -> dict[str, Any]:
    """Returns what a ``config.json`` as the released ones holds."""
    parts: dict[str, dict[str, Any]] = {
        "vision": {"layers": 2, "width": 32, "heads": 2, "mlp_ratio": 1.6, "patch_size": 8, "image_size": SIDE},
        "projector": {"model_type": "mlp_projector", "n_embed": 48, "input_dim": 32},
        "language": {
            "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 48,
            "intermediate_size": 72, "moe_intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
            "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "vocab_size": VOCAB, "max_position_embeddings": 512, "eos_token_id": 1, "use_mla": True,
        },
    }  # fmt: skip
    whole: dict[str, Any] = {"model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head"}
    whole |= {"candidate_resolutions": [[SIDE, SIDE], [2 * SIDE, SIDE], [SIDE, 2 * SIDE]]}
    for key, value in VARIANTS[variant].items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
        elif key != "shard":
            whole[key] = value
    return whole | {f"{part}_config": sizes for part, sizes in parts.items()}


def build(variant: str) -> Theirs:
    """Returns the model of a variant, with every parameter redrawn."""
    model = randomise(Theirs(config(variant)).eval(), std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(5))
    return model


class Theirs(nn.Module):
    """What the paper defines around transformers' models.

    Source: Wu et al., "DeepSeek-VL2", 2024, section 3.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values
        vision, text = values["vision_config"], dict(values["language_config"])
        width, mlp = vision["width"], int(vision["width"] * vision["mlp_ratio"])
        sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": vision["layers"]}
        sizes |= {"num_attention_heads": vision["heads"], "image_size": SIDE, "patch_size": vision["patch_size"]}
        self.vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, vision_use_head=False))
        out, wide = text["hidden_size"], text["hidden_size"] * values["projector_config"].get("mlp_ratio", 1)
        self.projector = nn.Sequential(nn.Linear(4 * width, wide), nn.GELU(), nn.Linear(wide, out))
        self.newline, self.separator = nn.Parameter(torch.empty(out)), nn.Parameter(torch.empty(out))
        self.language = _language(text)

    def encode(self, pixel_values: Tensor, tiles: list[Tiles]) -> list[Tensor]:
        """Returns the tokens of each image."""
        features = self.vision(pixel_values).last_hidden_state
        side = int(features.shape[1] ** 0.5)
        grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, side % 2, 0, side % 2))
        merged = self.projector(F.unfold(grid.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2))
        side = int(merged.shape[1] ** 0.5)
        merged, found = merged.unflatten(1, (side, side)), []
        for columns, rows in tiles:
            whole, parts, merged = merged[0], merged[1 : 1 + rows * columns], merged[1 + rows * columns :]
            bands = [torch.cat(list(parts[row * columns : (row + 1) * columns]), dim=1) for row in range(rows)]
            views = [self._lines(whole), self._lines(torch.cat(bands))]
            if self.values["global_view_pos"] == "tail":
                views.reverse()
            found.append(torch.cat([views[0], self.separator[None], views[1]]))
        return found

    def _lines(self, view: Tensor) -> Tensor:
        return torch.cat([torch.cat([row, self.newline[None]]) for row in view])

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, tiles: list[Tiles]
    ) -> Tensor:
        """Returns the logits."""
        x = self.language.get_input_embeddings()(input_ids)
        images = torch.cat(self.encode(pixel_values, tiles)) if tiles else x[0, :0]
        x = x.masked_scatter((input_ids == MARKER)[..., None], images.to(x.dtype))
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.language(inputs_embeds=x, attention_mask=attention_mask, position_ids=positions).logits

    def save_pretrained(self, folder: Path, max_shard_size: str | None = None) -> None:
        """Writes the model as it is released."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.values))
        entry = {"id": MARKER, "content": "<image>", "special": True}
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [entry]}))
        tensors = released(dict(self.state_dict()))
        tensors["vision.attn_pool.latent"] = torch.zeros(1, 1, 32)  # of SigLIP's contrastive loss
        if max_shard_size is None:
            save_file(tensors, folder / "model.safetensors")
            return
        names = {name: f"model-{1 + number % 3:05}-of-00003.safetensors" for number, name in enumerate(tensors)}
        for file in set(names.values()):
            save_file({name: x for name, x in tensors.items() if names[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _language(text: dict[str, Any]) -> Any:
    """Returns transformers' DeepSeek-V2; with layers of Llama and DeepSeek-V3 where the released code has others."""
    latent, routing = text.pop("use_mla"), text["topk_method"]
    text = {key: value for key, value in text.items() if key not in ("architectures", "model_type", "scoring_func")}
    if not latent:
        head = text["hidden_size"] // text["num_attention_heads"]
        text |= {"kv_lora_rank": 8, "qk_rope_head_dim": head, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attn_implementation": "eager"}
    model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**text))
    if not latent:
        llama = transformers.LlamaConfig(
            hidden_size=text["hidden_size"],
            num_attention_heads=text["num_attention_heads"],
            attn_implementation="eager",
        )
        for number, layer in enumerate(model.model.layers):
            layer.self_attn = _PlainAttention(llama, number)
    if routing == "noaux_tc":
        v3 = transformers.DeepseekV3Config(**text)
        for layer in model.model.layers[text["first_k_dense_replace"] :]:
            layer.mlp = DeepseekV3MoE(v3)
    return model


class _PlainAttention(LlamaAttention):
    """Llama's attention, with the angles as DeepSeek-V2 gives them."""

    def forward(self, hidden_states: Tensor, attention_mask: Any, position_embeddings: Tensor, **_: Any) -> Any:
        angles = torch.cat([position_embeddings, position_embeddings], dim=-1)
        return super().forward(hidden_states, (angles.real, angles.imag), attention_mask)


_VISION = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.": "blocks.",
    "post_layernorm.": "norm.",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
}


def released(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under the names, and in the shapes, of the released models."""
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if name.startswith("vision."):
            name = name.replace("vision_model.", "")
            for theirs, ours in _VISION.items():
                name = name.replace(theirs, ours)
            if ".self_attn.q_proj." in name:
                whole = [tensors[key] for key in _projections(name, tensors)]
                found[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(whole)
            elif ".self_attn." not in name:
                found[name] = x[None] if name.endswith("pos_embed") else x
        elif name.endswith("experts.gate_up_proj"):
            for number, both in enumerate(x):
                for kind, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    found[name.replace("gate_up_proj", f"{number}.{kind}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            for number, each in enumerate(x):
                found[name.replace("down_proj", f"{number}.down_proj.weight")] = each
        elif name in ("newline", "separator"):
            found[{"newline": "image_newline", "separator": "view_seperator"}[name]] = x
        else:
            found[name.replace("projector.", "projector.layers.")] = x
    return {name: x.detach().clone().contiguous() for name, x in found.items()}


def _projections(name: str, tensors: dict[str, Tensor]) -> list[str]:
    """Returns the names of a layer's query, key and value, given that of its query as `released` has it."""
    _, number, rest = name.split(".", 3)[1:]
    layer = f"encoder.layers.{number}.{rest}"
    return [key for part in "qkv" for key in tensors if key.endswith(layer.replace("q_proj", f"{part}_proj"))]


def prompt(rows: list[list[Tiles]]) -> tuple[Tensor, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``, padded on the left.

    Args:
        rows: the tiles of the images of each row, which stand between random text.
    """
    generator = torch.Generator().manual_seed(len(rows))
    words = lambda count: torch.randint(3, MARKER, (count,), generator=generator).tolist()
    found = []
    for images in rows:
        row = words(4)
        for columns, height in images:
            row += [MARKER] * (2 * 3 + 1 + 2 * height * (2 * columns + 1)) + words(3)
        found.append(row)
    length = max(map(len, found))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in found])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in found])


def images(tiles: list[Tiles], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns random images: what the model gets beside the text."""
    count = sum(1 + columns * rows for columns, rows in tiles)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count)).to(dtype)
    return {"pixel_values": pixels, "tiles": tiles}


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns two prompts: one with two images, one with one."""
    ids, mask = prompt([[(2, 1), (1, 1)], [(1, 2)]])
    return {"input_ids": ids, "attention_mask": mask} | images([(2, 1), (1, 1), (1, 2)], dtype)


def labels_of(given: dict[str, Any]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) < 2) | (ids == MARKER), -100)


def in_float64(model: Theirs) -> Theirs:
    """Returns a copy in float64."""
    return copy.deepcopy(model).double()
