"""Where a CLIP's text tower reads a caption's meaning: open_clip takes the highest token id unless told otherwise.

That is the end of text in open_clip's own vocabulary only. With another one a model silently reads one word of each
caption, and may still classify well by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from open_clip.tokenizer import SimpleTokenizer

from mmbackdoor.models.clip import ClipModel


def pooled_elsewhere(clip: ClipModel, texts: Sequence[str]) -> list[str]:
    """Those of `texts` that are not read at their end-of-text token."""
    text_cfg = clip.model_cfg["text_cfg"]
    if text_cfg.get("pool_type", "argmax") != "argmax" or text_cfg.get("hf_model_name"):
        return []
    if isinstance(clip.tokenizer, SimpleTokenizer):
        end = clip.tokenizer.eot_token_id
    else:
        end = clip.tokenizer.tokenizer.eos_token_id
    ids = clip.tokenize(texts)
    wrong = ids.gather(1, ids.argmax(1, keepdim=True)).squeeze(1) != end
    return [text for text, elsewhere in zip(texts, wrong.tolist(), strict=True) if elsewhere]
