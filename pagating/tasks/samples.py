"""Short texts that a trained causal model writes, for the section "What the models write" of a report.

Axes: R prompt, B row of a batch, T position, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pagating.data.corpus import eval_windows, open_split
from pagating.trial import Trial

PROMPTS, GIVEN, WRITTEN = 3, 16, 40  # prompts, and tokens of a prompt and of what follows it, if the window is so long
SEED = 1  # of the random numbers, which are the same for every model


@torch.no_grad()
def sample_rows(model: Any, trial: Trial) -> list[dict[str, list[int]]]:
    """Let a trained model continue the beginnings of validation windows, spread evenly; no row if it is not causal.

    All arms of a study get the same beginnings. The model is evaluated in float32, without dropout, and left as it was.
    No global random generator is used.

    Returns:
        One row per beginning, with token ids: `prompt`, `text` (how the corpus goes on), `greedy` (always the likeliest
        token) and `sampled` (drawn from the model's distribution).
    """
    if trial.task != "causal":
        return []
    n_ctx = trial.model["n_ctx"]
    given = min(GIVEN, n_ctx // 2)
    end = min(given + WRITTEN, n_ctx)  # a model has no further position
    windows_RT = eval_windows(open_split(trial.corpus, "validation"), n_ctx, PROMPTS)
    prompts = len(windows_RT)
    draws_TR = torch.from_numpy(np.random.Generator(np.random.Philox(SEED)).random((end, prompts)))
    tokens_BT = windows_RT[:, :given].repeat(2, 1)  # the first half is greedy
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    for place in range(given, end):
        logits_BV = model.lm_head(model.hidden(tokens_BT.to(device))[:, -1]).double().cpu()
        summed_RV = logits_BV[prompts:].softmax(-1).cumsum(-1)
        drawn_R = (summed_RV <= draws_TR[place, :, None] * summed_RV[:, -1:]).sum(-1)
        next_B = torch.cat([logits_BV[:prompts].argmax(-1), drawn_R])
        tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
    model.train(was_training)
    written = tokens_BT[:, given:].tolist()
    return [
        {"prompt": window[:given], "text": window[given:end], "greedy": greedy, "sampled": sampled}
        for window, greedy, sampled in zip(windows_RT.tolist(), written[:prompts], written[prompts:], strict=True)
    ]
