"""A kept model as MLflow serves it: texts in, texts out.

A logged model names this module, and MLflow calls its `_load_pyfunc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer

from pagating.hf.loading import from_pretrained

NEW_TOKENS = 20  # default of `max_new_tokens`


class Served:
    """A model and its tokenizer. It continues a text, or fills its masks.

    Args:
        folder: Folder of a kept model.
    """

    def __init__(self, folder: str) -> None:
        self.model = from_pretrained(folder, trust_remote_code=False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def predict(self, texts: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return one text per given text.

        A causal model continues the text; of a long one it sees the end. A masked model (BERT) replaces each `[MASK]`
        by its likeliest token. A span model (T5) writes what belongs in place of each `<extra_id_N>`.

        Args:
            texts: A table with one column, an array or a list.
            params: `max_new_tokens`; the likeliest token is taken each time.
        """
        values = texts.to_numpy().ravel() if hasattr(texts, "to_numpy") else texts
        rows = [values] if isinstance(values, str) else [str(value) for value in values]
        most = int((params or {}).get("max_new_tokens", NEW_TOKENS))
        return [self._answer(text, most) for text in rows]

    @torch.no_grad()
    def _answer(self, text: str, most: int) -> str:
        ids_1T = torch.tensor([self.tokenizer(text)["input_ids"]], dtype=torch.long)
        if ids_1T.shape[1] == 0:
            return ""
        config = self.model.config
        if not self.model.can_generate():
            ids_1T = ids_1T[:, : config.max_position_embeddings]
            hidden = ids_1T == self.tokenizer.mask_token_id
            ids_1T[hidden] = self.model(input_ids=ids_1T).logits.argmax(-1)[hidden]
        elif config.is_encoder_decoder:
            ids_1T = self.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=most)[:, 1:]
        else:
            most = max(1, min(most, config.n_positions - 1))
            ids_1T = ids_1T[:, most - config.n_positions :]
            options = {"do_sample": False, "max_new_tokens": most, "max_length": None}
            ids_1T = self.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)
        answer: str = self.tokenizer.decode(ids_1T[0])
        return answer


def _load_pyfunc(path: str) -> Served:
    return Served(path)
