"""Attention of SAM's image encoder, which many models of documents share: relative positions without their table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations.patching.attend import attend_recorded
from mmkernels.integrations.patching.changes import Known
from mmkernels.integrations.patching.classes import original_method
from mmkernels.models.blocks.relative_positions import with_relative_positions

Output = tuple[Tensor, "Tensor | None"]


def eager_attention(module: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> Output:
    """Returns ``[B, h, w, C]`` of ``[B, h, w, C]``; and weights ``[B * H, hw, hw]`` where transformers records them."""
    dropout = module.dropout if module.training else 0.0
    out, weights = _attend(module, hidden_states, dropout)
    return out, None if weights is None else weights.flatten(0, 1)


def sdpa_attention(module: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> Output:
    """The same of the classes on PyTorch's own attention, which have no dropout and return no weights."""
    if output_attentions:  # which warns
        result: Output = original_method(module, "forward")(hidden_states, output_attentions)
        return result
    return _attend(module, hidden_states, 0.0)[0], None


def _attend(module: Any, x: Tensor, dropout: float) -> Output:
    batch, height, width, _ = x.shape
    projected = module.qkv(x).view(batch, height * width, 3, module.num_attention_heads, -1)
    query, key, value = projected.transpose(1, 3).unbind(2)  # [B, H, h w, D]
    scale = module.scale
    if module.use_rel_pos:
        rows = module.get_rel_pos(height, height, module.rel_pos_h)  # [h, h, D]
        columns = module.get_rel_pos(width, width, module.rel_pos_w)  # [w, w, D]
        query, key = with_relative_positions(query, key, rows, columns, scale)
        scale = 1.0
    out, weights = attend_recorded(module, query, key, value, scale=scale, dropout=dropout)
    return module.proj(out.view(batch, height, width, -1)), weights


def _row(path: str, method: Any) -> Known:
    return Known(
        f"transformers.models.{path}",
        {"forward": method},
        {"forward": ("hidden_states", "output_attentions"), "get_rel_pos": ("q_size", "k_size", "rel_pos")},
        what="attention",
        op="cross_attention",
        effect="no score matrix, nor one of positions",
        attributes=("qkv", "proj", "num_attention_heads", "scale", "dropout", "use_rel_pos"),
    )


SAM = (
    _row("sam.modeling_sam.SamVisionAttention", eager_attention),
    _row("sam.modeling_sam.SamVisionSdpaAttention", sdpa_attention),
    _row("sam_hq.modeling_sam_hq.SamHQVisionAttention", eager_attention),
    _row("sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention", sdpa_attention),
    _row("got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention", eager_attention),
    _row("deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention", eager_attention),
    _row("deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention", sdpa_attention),
    _row("unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention", eager_attention),
    _row("unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention", sdpa_attention),
    _row("pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionAttention", eager_attention),
    _row("slanext.modeling_slanext.SLANeXtVisionAttention", eager_attention),
)
